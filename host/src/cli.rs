//! The command line as typed. Each command's own arguments stand in the module that carries it out.

use anyhow::Result;
use clap::{CommandFactory, Parser, Subcommand};
use std::process::ExitCode;

/// Runs a WebAssembly component on every message of a NATS JetStream stream, a fresh sandboxed instance each.
#[derive(Debug, Parser)]
#[command(name = "host", version, max_term_width = 110)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print a completion script for your shell
    Completions {
        /// The shell to complete in
        shell: clap_complete::Shell,
    },
}

impl Cli {
    /// Carries out the command.
    ///
    /// # Errors
    /// Whatever kept the command from its work, with the remedy where there is one.
    pub fn execute(self) -> Result<ExitCode> {
        match self.command {
            Command::Completions { shell } => {
                clap_complete::generate(shell, &mut Self::command(), "host", &mut std::io::stdout());
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}
