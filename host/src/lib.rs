//! Mailroom's host: takes messages from NATS JetStream and runs a WebAssembly component on each, in a fresh
//! sandboxed instance.
//!
//! The path of one message: a shard of [`host`] has room and pulls through [`source`]; the message gets a slot and
//! an instance from [`pool`], whose imports are what [`capabilities`] grants; the guest answers in the words of
//! [`interface`]; [`settle`] says what the answer means; [`sink`] stores the verdict or the dead letter and awaits
//! its PubAck; only then is the message acknowledged, if [`identity`] says that it is still there. Messages that the
//! NATS client cannot read are found by [`unreadable`]; retries that are due late wait in [`parking`]. [`admin`] shows all of it to operators.
//!
//! The loop runs any [`handler`]: the pool's components, or a [`native`] function, which they are measured against.
//! [`replacement`] puts another component in the place of one that runs.

mod cli;
mod run;

mod admin;
mod batch;
mod capabilities;
pub mod handler;
mod header_block;
mod host;
mod interface;
mod lane;
mod letter;
pub mod native;
mod parking;
pub mod pool;
mod replacement;
mod room;
mod scheduling;
mod settle;
mod sink;
mod source;
mod turns;

mod identity;
mod unreadable;

mod component;
mod engine;
mod layout;
mod log;
mod names;
mod nats;
#[cfg(feature = "compile")]
mod tables;

mod dead;
mod dev;
#[cfg(feature = "compile")]
mod image;
mod mails;
mod provision;
mod publish;
#[cfg(feature = "scaler")]
mod scaler;
mod triage;
mod verdicts;

pub use capabilities::{Configuration, Grants, KeyValue};
pub use cli::main;
pub use component::Loaded;
#[cfg(feature = "compile")]
pub use component::{compile, engine_id, from_bytes};
