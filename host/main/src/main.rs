//! The `host` executable.

use std::process::ExitCode;

fn main() -> ExitCode {
    host::main(version::LONG)
}
