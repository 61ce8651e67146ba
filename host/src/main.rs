//! The `host` executable: parses the command line, runs the command, turns the result into an exit code.

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    match host::Cli::parse().execute() {
        Ok(code) => code,
        Err(err) => {
            eprintln!("error: {err:#}");
            ExitCode::FAILURE
        }
    }
}
