//! The harness of the end-to-end tests and of the demo: real parts, each private to its test.
//!
//! | module | what it holds |
//! |---|---|
//! | [`tools`] | where the executables and components lie, and which command makes a missing one |
//! | [`NatsServer`] | a private nats-server on a free port, gone when dropped |
//! | [`Host`] | a `host run` process: its log, its metrics, its signals |
//! | [`bed`] | what most tests stand on: a provisioned server |
//! | [`streams`] | what is stored: verdicts, dead letters, mail |
//! | [`ImageLayout`] | a container image on disk, checked |
//! | [`command`] | one-shot commands with a time limit |
//! | [`report`] | what benchmarks print and write |
//! | [`page`] | pages of the documentation, and how what they show is run |
//! | [`http`] | plain requests to the host's admin endpoint and to `wasmtime serve` |
//!
//! Nothing here sleeps for a fixed time: whatever is waited for has a condition and a deadline ([`eventually`]).

pub mod bed;
pub mod command;
mod host;
pub mod http;
mod layout;
mod nats;
pub mod page;
mod process;
mod raw;
pub mod report;
pub mod streams;
pub mod tools;
mod wait;

pub use host::{Host, HostBuilder, Metrics};
pub use layout::{ImageLayout, LayerEntry};
pub use nats::{NatsServer, Settings};
pub use process::Process;
pub use raw::RawClient;
pub use wait::{asked_to_stop, eventually};

/// Everything an end-to-end test usually needs.
pub mod prelude {
    pub use crate::command::{self, Output};
    pub use crate::streams::{self, Stored};
    pub use crate::{Host, Metrics, NatsServer, Process, Settings, eventually, http, tools};
    pub use anyhow::{Context as _, Result, bail, ensure};
    pub use rustix::process::Signal;
    pub use std::time::Duration;
}
