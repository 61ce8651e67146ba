//! Mailroom's host.

mod cli;
pub mod dev;
pub mod mails;
pub mod names;
pub mod nats;
pub mod provision;
pub mod publish;
pub mod verdicts;

pub use cli::Cli;
