//! What is shipped is built twice: with counters in it, which say what it does most when it settles messages, and then
//! for that: profile-guided optimization, <https://doc.rust-lang.org/rustc/profile-guided-optimization.html>.

use crate::node::{self, Static};
use crate::step::{self, Result, Workspace};
use crate::tools;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Builds these executables optimized, by what they did when they were counted, without symbols, into `folder` below the
/// target directory. What is built by [`crate::build`] has to be there.
pub fn build(workspace: &Workspace, nats_server: &Path, executables: &[&Static], folder: &str) -> Result<()> {
    let profile = profile(workspace, nats_server, executables)?;
    let folder = workspace.target.join(folder);
    tools::make_folder(&folder)?;
    for executable in executables {
        let built = compile(workspace, executable, &format!("-Cprofile-use={}", profile.display()))?;
        node::strip(workspace, "--strip-all", &built, &folder.join(executable.name))?;
    }
    Ok(())
}

/// What executables with counters do, all of them together, as `rustc -Cprofile-use` takes it. It is made anew when they
/// are.
fn profile(workspace: &Workspace, nats_server: &Path, executables: &[&Static]) -> Result<PathBuf> {
    let merge = llvm_profdata(workspace)?;
    let names: Vec<_> = executables.iter().map(|executable| executable.name).collect();
    let folder = workspace.target.join("counted").join(names.join("+"));
    let (counts, profile) = (folder.join("counts"), folder.join("profile"));
    tools::make_folder(&folder)?;
    let built: Vec<_> = executables
        .iter()
        .map(|executable| {
            let built = compile(workspace, executable, &format!("-Cprofile-generate={}", counts.display()))?;
            // Where it is built, the one without counters comes next.
            let kept = folder.join(executable.name);
            let age = |file: &Path| file.metadata().and_then(|file| file.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
            let is_new = age(&built) > age(&profile);
            if is_new {
                fs::copy(&built, &kept).map_err(|err| format!("copy {}: {err}", built.display()))?;
            }
            Ok((kept, is_new))
        })
        .collect::<Result<_>>()?;
    if built.iter().any(|(_, is_new)| *is_new) {
        tools::remove(&counts)?;
        let mut work = workspace.command(workspace.target.join("release/bench"));
        work.arg("count").args(built.iter().map(|(executable, _)| executable));
        work.envs(crate::places(workspace)).env("MAILROOM_TEST_NATS_SERVER", nats_server);
        step::run("count what they do with messages", work)?;
        let mut merge = workspace.command(merge);
        merge.args(["merge", "--output"]).arg(&profile).arg(&counts);
        step::run("add up what was counted", merge)?;
    }
    Ok(profile)
}

/// Builds a static executable with one flag more for each of its crates. Returns where it is.
fn compile(workspace: &Workspace, executable: &Static, flag: &str) -> Result<PathBuf> {
    let target = host_triple(workspace)?;
    let mut cargo = workspace.cargo(&["build", "--profile", "optimized", "--target", &target]);
    cargo.args(["--package", executable.package, "--bin", executable.name]);
    let flags: Vec<_> = [flag].iter().chain(Static::FLAGS.as_flattened()).copied().collect();
    // With a target named, they are not for build scripts and macros.
    cargo.env_remove("RUSTFLAGS").env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    let (how, _) = flag.trim_start_matches("-C").split_once('=').unwrap_or((flag, ""));
    step::run(&format!("build {} optimized, {how}", executable.name), cargo)?;
    Ok(workspace.target.join(target).join("optimized").join(executable.name))
}

/// What this machine's programs are compiled for.
fn host_triple(workspace: &Workspace) -> Result<String> {
    let version = step::output(workspace.command("rustc").args(["--version", "--verbose"]))?;
    let triple = version.lines().find_map(|line| line.strip_prefix("host: "));
    triple.map(str::to_owned).ok_or_else(|| format!("rustc names no host: {version}"))
}

/// The program that adds counts up, of the same LLVM as the compiler.
fn llvm_profdata(workspace: &Workspace) -> Result<PathBuf> {
    let sysroot = step::output(workspace.command("rustc").args(["--print", "sysroot"]))?;
    let program = Path::new(sysroot.trim()).join("lib/rustlib").join(host_triple(workspace)?).join("bin/llvm-profdata");
    if !program.is_file() {
        if !step::succeeds(workspace.command("rustup").arg("--version")) {
            let program = program.display();
            return Err(format!(
                "there is no {program}, and no rustup to add it; install rustup, or its llvm-tools there"
            ));
        }
        let mut add = workspace.command("rustup");
        add.args(["component", "add", "llvm-tools"]);
        step::run("add llvm-tools to the Rust toolchain", add)?;
    }
    Ok(program)
}
