//! The `host` executable: parses the command line, runs the command, turns the result into an exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    match host::Cli::from_command_line().execute() {
        Ok(code) => code,
        Err(err) => {
            eprintln!("error: {err:#}");
            ExitCode::FAILURE
        }
    }
}
