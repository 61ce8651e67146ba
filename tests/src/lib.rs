//! The harness of the end-to-end tests and of the demo: real parts, each private to its test.
//!
//! | module | what it holds |
//! |---|---|
//! | [`tools`] | where the executables and components lie, and which command makes a missing one |
//! | [`NatsServer`] | a private nats-server on a free port, gone when dropped |
//! | [`Host`] | a `host run` process: its log, its metrics, its signals |
//! | [`Scaler`] | a `host scaler` process, and KEDA's calls to it |
//! | [`bed`] | what most tests stand on: a provisioned server |
//! | [`streams`] | what is stored: verdicts, dead letters, mail |
//! | [`Books`] | what went in, and what came of each |
//! | [`Fleet`] | hosts that share a consumer, and all that may happen to them |
//! | [`Cluster`] | three servers that keep every stream three times |
//! | [`autoscaler`] | KEDA and Kubernetes' autoscaler, as far as they decide how many hosts there are |
//! | [`simulation`] | hosts that come and go as these decide |
//! | [`lines`] | curves over time as a picture |
//! | [`Proxy`] | a network that can be cut |
//! | [`mix`] | mails of all kinds, and a publisher that nothing stops |
//! | [`ImageLayout`] | a container image on disk, checked |
//! | [`command`] | one-shot commands with a time limit |
//! | [`report`] | what benchmarks print and write |
//! | [`page`] | pages of the documentation, and how what they show is run |
//! | [`http`] | plain requests to the host's admin endpoint and to `wasmtime serve` |
//!
//! Nothing here sleeps for a fixed time: whatever is waited for has a condition and a deadline ([`eventually`]).

pub mod autoscaler;
pub mod bed;
mod books;
mod cluster;
pub mod command;
mod fleet;
mod host;
pub mod http;
mod layout;
pub mod lines;
pub mod mix;
mod nats;
pub mod page;
mod process;
mod program;
mod proxy;
mod raw;
pub mod report;
pub mod scaler;
pub mod simulation;
pub mod streams;
pub mod tools;
mod wait;

pub use books::Books;
pub use cluster::Cluster;
pub use fleet::{Fault, Fleet};
pub use host::{Host, HostBuilder, Metrics};
pub use layout::{ImageLayout, LayerEntry};
pub use nats::{NatsServer, Settings};
pub use process::Process;
pub use program::program;
pub use proxy::Proxy;
pub use raw::RawClient;
pub use scaler::Scaler;
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
