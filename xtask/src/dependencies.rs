//! Checks what is linked in against `.cargo/deny.toml`.

use crate::step::{self, Result, Workspace};
use crate::tools;
use std::process::Command;

/// What cargo-deny says when it has no advisories to compare with.
const NO_DATABASE: &str = "failed to fetch advisory database";

/// Checks licences, bans and sources, and advisories where they can be had.
pub fn check(workspace: &Workspace) -> Result<()> {
    let executable = tools::cargo_deny(workspace)?;
    let deny = |checks: &[&str]| -> Command {
        let mut deny = workspace.command(&executable);
        deny.args(["--config", ".cargo/deny.toml", "--locked", "check", "--hide-inclusion-graph"]).args(checks);
        deny
    };
    step::run("check licences, bans and sources of the dependencies", deny(&["licenses", "bans", "sources"]))?;

    eprintln!("==> check the dependencies for advisories");
    let mut advisories = deny(&["advisories"]);
    let output = advisories.output().map_err(|err| format!("start {}: {err}", executable.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() && said.contains(NO_DATABASE) {
        eprintln!("    not checked: the database of advisories cannot be fetched here");
        return Ok(());
    }
    eprint!("{said}");
    match output.status.success() {
        true => Ok(()),
        false => {
            Err("a dependency has an advisory against it; take another version, or say in .cargo/deny.toml why it \
                      does not concern us"
                .to_owned())
        }
    }
}
