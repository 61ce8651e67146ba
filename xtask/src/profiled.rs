//! Profile-guided optimization of what is shipped: it is built with counters, settles messages, and is built again by
//! what was counted, its profile. See <https://doc.rust-lang.org/rustc/profile-guided-optimization.html>.

use crate::node::{self, Static};
use crate::step::{self, Result, Workspace};
use crate::tools;
use std::fs;
use std::path::{Path, PathBuf};

/// Sees to it that profiles can be made.
pub fn ensure_tools(workspace: &Workspace) -> Result<()> {
    tools::ensure(&[("openssl", "openssl")], "to count what is done over TLS")?;
    let program = llvm_profdata(workspace)?;
    let shown = program.display();
    if program.is_file() {
        return Ok(());
    }
    if !step::succeeds(workspace.command("rustup").arg("--version")) {
        return Err(format!("there is no {shown}, and no rustup to add it; install rustup, or its llvm-tools there"));
    }
    let mut add = workspace.command("rustup");
    add.args(["component", "add", "llvm-tools"]);
    step::run("add llvm-tools to the Rust toolchain", add)?;
    if program.is_file() { Ok(()) } else { Err(format!("rustup's llvm-tools are for another rustc: no {shown}")) }
}

/// Builds an executable by its profile, without symbols, into `folder` below the target directory. [`crate::build`] has
/// been called, and [`ensure_tools`].
pub fn build(workspace: &Workspace, nats_server: &Path, executable: &Static, folder: &str) -> Result<()> {
    let profile = profile(workspace, nats_server, executable)?;
    let built = compile(workspace, executable, "profile-use", &profile)?;
    let folder = workspace.target.join(folder);
    tools::make_folder(&folder)?;
    node::strip(workspace, "--strip-all", &built, &folder.join(executable.name))
}

/// The profile of an executable, made anew when the one with counters is another than the last time. Remove
/// `TARGET/profiled` to have it made in any case.
fn profile(workspace: &Workspace, nats_server: &Path, executable: &Static) -> Result<PathBuf> {
    let folder = workspace.target.join("profiled").join(executable.name);
    let (counts, profile, of) = (folder.join("counts"), folder.join("profile"), folder.join(executable.name));
    let built = compile(workspace, executable, "profile-generate", &counts)?;
    if profile.is_file() && of.is_file() && fs::read(&built).ok() == fs::read(&of).ok() {
        return Ok(profile);
    }
    // All that is of another one, so that nothing is taken for whole if this breaks off.
    tools::remove(&folder)?;
    tools::make_folder(&folder)?;
    let mut work = workspace.command(workspace.target.join("release/bench"));
    work.arg("count").arg(&built).envs(crate::places(workspace)).env("MAILROOM_TEST_NATS_SERVER", nats_server);
    // Where it is set, counts would go there.
    work.env_remove("LLVM_PROFILE_FILE");
    step::run(&format!("count what {} does with messages", executable.name), work)?;
    let mut merge = workspace.command(llvm_profdata(workspace)?);
    merge.args(["merge", "--output"]).arg(&profile).arg(&counts);
    step::run("add up what was counted", merge)?;
    // Last: it says that the profile is whole.
    fs::copy(&built, &of).map_err(|err| format!("copy {}: {err}", built.display()))?;
    Ok(profile)
}

/// Builds a static executable with `-C OPTION=FILE` for each of its crates. Returns where it is.
fn compile(workspace: &Workspace, executable: &Static, option: &str, file: &Path) -> Result<PathBuf> {
    let target = step::output(workspace.command("rustc").args(["--print", "host-tuple"]))?;
    let target = target.trim();
    let mut cargo = workspace.cargo(&["build", "--profile", "optimized", "--target", target]);
    cargo.args(["--package", executable.package, "--bin", executable.name]);
    let option_of_all = format!("-C{option}={}", file.display());
    let flags: Vec<_> = [&*option_of_all].into_iter().chain(Static::FLAGS).collect();
    // In place of the user's own, on which what is shipped does not depend. With a target named, they are not for build
    // scripts and macros.
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    step::run(&format!("build {} optimized, {option}", executable.name), cargo)?;
    Ok(workspace.target.join(target).join("optimized").join(executable.name))
}

/// The program that adds counts up, of the same LLVM as the compiler.
fn llvm_profdata(workspace: &Workspace) -> Result<PathBuf> {
    let libraries = step::output(workspace.command("rustc").args(["--print", "target-libdir"]))?;
    Ok(Path::new(libraries.trim()).with_file_name("bin").join("llvm-profdata"))
}
