//! Mailroom's host.

mod cli;
pub mod dev;
pub mod names;
pub mod nats;

pub use cli::Cli;
