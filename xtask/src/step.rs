//! Where things lie, and one command at a time.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// Errors are for people only: what failed and what to do.
pub type Result<T> = std::result::Result<T, String>;

/// The repository and cargo's target directory.
pub struct Workspace {
    /// The top folder of the repository.
    pub root: PathBuf,
    /// Cargo's target directory, absolute, wherever the user or their configuration put it.
    pub target: PathBuf,
}

impl Workspace {
    /// Asks cargo.
    pub fn find() -> Result<Self> {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = manifest.parent().ok_or("xtask lies outside of a workspace")?.to_owned();
        let mut metadata = Command::new(cargo());
        metadata.args(["metadata", "--no-deps", "--format-version=1", "--manifest-path"]).arg(root.join("Cargo.toml"));
        let text = output(&mut metadata)?;
        let target = json_string(&text, "target_directory").ok_or("cargo metadata names no target_directory")?;
        Ok(Self { root, target: target.into() })
    }

    /// A command that runs in the repository, with the target directory found here.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.root).env("CARGO_TARGET_DIR", &self.target);
        command
    }

    /// A cargo command, as if typed.
    pub fn cargo(&self, args: &[&str]) -> Command {
        let mut command = self.command(cargo());
        command.args(args);
        // What `cargo run` says of this package. Some build scripts read variables of these names, and would run again
        // whenever cargo is called the other way.
        let of_package = |name: &std::ffi::OsString| {
            ["CARGO_PKG_", "CARGO_MANIFEST_"].iter().any(|start| name.as_encoded_bytes().starts_with(start.as_bytes()))
        };
        for name in std::env::vars_os().map(|(name, _)| name).filter(of_package) {
            command.env_remove(name);
        }
        command
    }
}

/// Runs `command` with its output passed on, and says what it is and how long it took.
pub fn run(what: &str, mut command: Command) -> Result<()> {
    eprintln!("==> {what}");
    let start = Instant::now();
    let status = command.status().map_err(|err| format!("start {command:?}: {err}"))?;
    if !status.success() {
        return Err(format!("could not {what}: {} ended with {status}", shown(&command)));
    }
    eprintln!("    took {:.1} s", start.elapsed().as_secs_f32());
    Ok(())
}

/// Runs `command` and returns its standard output; its standard error is passed on.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command.stderr(Stdio::inherit()).output().map_err(|err| format!("start {command:?}: {err}"))?;
    if !output.status.success() {
        return Err(format!("{} ended with {}", shown(command), output.status));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether `command` ends with success; its output is discarded.
pub fn succeeds(command: &mut Command) -> bool {
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}

/// The command as one would type it, without the environment that was added.
fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    format!("`{}`", words.join(" "))
}

/// The cargo that runs this.
fn cargo() -> std::ffi::OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// The first string called `key` in JSON that a program wrote.
pub fn json_string(json: &str, key: &str) -> Option<String> {
    let (_, rest) = json.split_once(&format!("\"{key}\":\""))?;
    let mut value = String::new();
    let mut chars = rest.chars();
    loop {
        match chars.next()? {
            '"' => return Some(value),
            '\\' => value.push(chars.next()?),
            other => value.push(other),
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn strings_are_found_in_json() {
        let json = r#"{"a":1,"target_directory":"/tmp/a \"b\"/target","z":"y"}"#;
        assert_eq!(super::json_string(json, "target_directory").as_deref(), Some("/tmp/a \"b\"/target"));
        assert_eq!(super::json_string(json, "root"), None);
    }
}
