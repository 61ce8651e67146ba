//! Mailroom's host.

mod cli;

pub use cli::Cli;
