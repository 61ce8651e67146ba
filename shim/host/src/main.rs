//! The `host` executable as the shim puts it into pods: it loads machine code and makes none.

use std::process::ExitCode;

fn main() -> ExitCode {
    host::main(version::LONG)
}
