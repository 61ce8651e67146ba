//! `mailroom-node`: makes a machine one that runs components, and makes it again what it was.
//!
//! | module | what it does |
//! |---|---|
//! | [`configuration`] | adds the runtime to containerd's configuration, and takes it out |
//! | [`installation`] | what lies on a node: executables, the configuration; containerd's restart |

mod configuration;
mod installation;

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand};
use installation::{Executables, Installation};
use rustix::process::{chdir, chroot};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::path::PathBuf;
use std::process::ExitCode;

/// Makes a machine a node that runs components under containerd, and undoes it.
#[derive(Debug, Parser)]
#[command(name = "mailroom-node", version = version::SHORT, long_version = version::LONG)]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Place the shim, tell containerd of it, and restart containerd if its configuration has changed
    Install(Site),
    /// Wait for SIGTERM, then undo what `install` did, unless another owner has installed since
    Stay(Site),
    /// Undo what `install` did
    Remove(Site),
}

#[derive(Debug, Args)]
struct Site {
    /// Where the node's root is
    #[arg(long, value_name = "FOLDER", default_value = "/", env = "MAILROOM_NODE_ROOT")]
    root: PathBuf,

    /// Where the executables go: on containerd's PATH
    #[arg(long, value_name = "FOLDER", default_value = "/usr/local/bin", env = "MAILROOM_NODE_BIN")]
    bin: PathBuf,

    /// containerd's configuration [default: k3s' template if there is k3s, else /etc/containerd/config.toml]
    #[arg(long, value_name = "FILE", env = "MAILROOM_NODE_CONFIG")]
    config: Option<PathBuf>,

    /// A file on the node with options for the shim, which containerd hands to it
    #[arg(long, value_name = "FILE", env = "MAILROOM_NODE_OPTIONS")]
    options: Option<String>,

    /// The command that restarts containerd, run on the node without a shell: words with blanks between
    /// [default: systemctl restart containerd, or k3s, or k3s-agent]
    #[arg(long, value_name = "COMMAND", env = "MAILROOM_NODE_RESTART")]
    restart: Option<String>,

    /// Who installs, a pod's id: whoever installs later is in charge of the removal
    #[arg(long, value_name = "ID", env = "MAILROOM_NODE_OWNER")]
    owner: Option<String>,
}

fn main() -> ExitCode {
    match Cli::parse().command.execute() {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("error: {err:#}");
            ExitCode::FAILURE
        }
    }
}

impl Task {
    fn execute(self) -> Result<()> {
        match self {
            Self::Install(site) => {
                // Those of the image, which cannot be seen any more from within the node's root.
                let executables = Executables::read()?;
                site.enter()?.install(executables)
            }
            Self::Stay(site) => {
                // Before anything else: a signal that nobody waits for is not seen by a container's first process.
                let mut signals = Signals::new([SIGTERM, SIGINT]).context("wait for signals")?;
                let installation = site.enter()?;
                println!("{} is there until this ends", installation.describe());
                signals.forever().next();
                installation.remove()
            }
            Self::Remove(site) => site.enter()?.remove(),
        }
    }
}

impl Site {
    /// Makes the node's root this process's, so that every path and link means what it means there.
    fn enter(self) -> Result<Installation> {
        chroot(&self.root).with_context(|| format!("enter {}", self.root.display()))?;
        chdir("/").context("enter the node's root")?;
        Ok(Installation::new(self.bin, self.config, self.options, self.restart, self.owner))
    }
}
