//! What the executables say of themselves.
//!
//! Only executables depend on it: it changes with every commit, and all that depends on it is built anew then.

/// The version alone.
pub const SHORT: &str = env!("CARGO_PKG_VERSION");

/// The version, the commit that it was built from, and wasmtime's version: `0.1.0 (commit 0123456789ab, wasmtime 48.0.8)`.
///
/// The commit ends in `-dirty` when the sources were not as they are there, and is `unknown` without git.
pub const LONG: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    " (commit ",
    env!("MAILROOM_COMMIT"),
    ", wasmtime ",
    env!("MAILROOM_WASMTIME"),
    ")"
);
