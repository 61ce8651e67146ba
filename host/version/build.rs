//! Asks git for the commit and `Cargo.lock` for wasmtime's version.

use std::env;
use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::Command;

/// What executables are made of, in the workspace. A change to anything else leaves them as they are at the commit.
const SOURCES: [&str; 6] = ["Cargo.lock", "Cargo.toml", "host", "rust-toolchain.toml", "shim", "wit"];

/// Digits of the commit's hash, however long git makes it here.
const DIGITS: &str = "--short=12";

fn main() -> Result<(), Box<dyn Error>> {
    let folder = env::var("CARGO_MANIFEST_DIR")?;
    let root = Path::new(&folder).ancestors().nth(2).ok_or("not in a workspace")?;
    for source in SOURCES {
        watch(&root.join(source));
    }
    let lock = fs::read_to_string(root.join("Cargo.lock")).map_err(|err| format!("read Cargo.lock: {err}"))?;
    println!("cargo::rustc-env=MAILROOM_WASMTIME={}", wasmtime(&lock).ok_or("Cargo.lock names no wasmtime")?);

    println!("cargo::rerun-if-env-changed=MAILROOM_COMMIT");
    let given = env::var("MAILROOM_COMMIT").ok().filter(|given| !given.is_empty());
    let commit = given.or_else(|| commit(root)).unwrap_or_else(|| "unknown".to_owned());
    println!("cargo::rustc-env=MAILROOM_COMMIT={commit}");
    Ok(())
}

/// The commit at `root`. Nothing without git, and in the sources of a release that lie somewhere in other sources.
fn commit(root: &Path) -> Option<String> {
    let git = |args: &[&str]| {
        let output = Command::new("git").current_dir(root).arg("--no-optional-locks").args(args).output().ok()?;
        let text = output.status.success().then(|| String::from_utf8(output.stdout).ok())??;
        Some(text.trim().to_owned())
    };
    if !git(&["rev-parse", "--show-prefix"])?.is_empty() {
        return None;
    }
    let hash = git(&["rev-parse", DIGITS, "HEAD"])?;
    // Whatever moves HEAD writes to its log. Where none is kept, only switching branches is noticed.
    for file in ["HEAD", "logs/HEAD"] {
        watch(&root.join(git(&["rev-parse", "--git-path", file])?));
    }
    let changed = git(&[&["status", "--porcelain", "--"], &SOURCES[..]].concat())?;
    Some(if changed.is_empty() { hash } else { hash + "-dirty" })
}

/// Has cargo run this again when `path` changes. One that is not there would be taken for changed every time.
fn watch(path: &Path) {
    if path.exists() {
        println!("cargo::rerun-if-changed={}", path.display());
    }
}

/// The version in wasmtime's entry of a `Cargo.lock`.
fn wasmtime(lock: &str) -> Option<&str> {
    let (_, entry) = lock.split_once("name = \"wasmtime\"\nversion = \"")?;
    entry.split('"').next()
}
