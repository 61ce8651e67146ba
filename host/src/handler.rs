//! What runs on every message: a component in an instance of the [`pool`](crate::pool), or a [`native`](crate::native)
//! function.

use crate::interface::{self, Message, Verdict};
use anyhow::Result;
use std::sync::Arc;
use std::time::Duration;

/// What runs on every message. Shards hold it behind an `Arc`.
pub trait Handler: Send + Sync + 'static {
    /// A run on one message.
    type Call: Future<Output = Run> + Send + Unpin + 'static;

    /// What people call it.
    fn name(&self) -> String;

    /// Names it in the header `Mailroom-Component` and in metrics: the SHA-256 of a component's bytes, as `sha256:…`; of
    /// a `.cwasm`, that of the `.wasm` it was made from.
    fn digest(&self) -> &Arc<str>;

    /// The same for the shard with this number, with nothing in it that shards would wait for each other at. Takes a
    /// millisecond, and the calling thread for it.
    ///
    /// # Errors
    /// There is no room for it.
    fn for_shard(&self, number: u32) -> Result<Self>
    where
        Self: Sized;

    /// Most runs at the same time.
    fn slots(&self) -> u32;

    /// Begins to run once on `message`. Nothing happens before the call is polled.
    fn triage(self: &Arc<Self>, message: Arc<Message>) -> Self::Call;

    /// What its pool of instances holds, if it has one.
    fn pool_use(&self) -> Option<PoolUse>;
}

/// What a pool of instances holds.
#[derive(Debug, Clone, Copy)]
pub struct PoolUse {
    /// Component instances in the pool now.
    pub instances: u64,
    /// Memory of free slots that stays mapped for the next instances.
    pub kept_bytes: usize,
}

impl PoolUse {
    /// Both together.
    pub fn and(self, other: Self) -> Self {
        Self { instances: self.instances + other.instances, kept_bytes: self.kept_bytes + other.kept_bytes }
    }
}

/// Why a message got no verdict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// The guest asks for another delivery, after the given time or the host's own back-off.
    Retry(Option<Duration>, String),
    /// The guest will never triage this message.
    Rejected(String),
    /// The instance broke off; the text says why and, where known, in which functions.
    Broken(Fault, String),
}

/// What broke an instance off. The names are those in headers and metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// `trap`: the guest trapped by itself, or broke a rule of the component model.
    Trap,
    /// `deadline`: time ran out.
    Deadline,
    /// `memory`: the guest wanted more memory than it may have, and trapped.
    Memory,
    /// `stack`: the guest's stack ran over.
    Stack,
    /// `output`: the answer was too large or outside the interface's bounds.
    Output,
    /// `host-calls`: the guest called the host too often.
    HostCalls,
}

impl Fault {
    /// The fault's name in headers and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Trap => "trap",
            Self::Deadline => "deadline",
            Self::Memory => "memory",
            Self::Stack => "stack",
            Self::Output => "output",
            Self::HostCalls => "host-calls",
        }
    }
}

/// What came of one run.
pub struct Run {
    /// The verdict, within the interface's bounds, or why there is none.
    pub outcome: Result<Verdict, Failure>,
    /// How long it took to make the instance.
    pub instantiate: Duration,
    /// How long the guest ran, waiting included.
    pub guest: Duration,
}

/// What a handler's answer means: a verdict outside of the interface's bounds is none.
pub fn outcome(answer: Result<Verdict, interface::Failure>) -> Result<Verdict, Failure> {
    match answer {
        Ok(verdict) => match verdict.check() {
            Ok(()) => Ok(verdict),
            Err(wrong) => Err(Failure::Broken(Fault::Output, wrong)),
        },
        Err(interface::Failure::Retry(retry)) => {
            Err(Failure::Retry(retry.after_ms.map(|ms| Duration::from_millis(ms.into())), retry.reason))
        }
        Err(interface::Failure::Reject(reason)) => Err(Failure::Rejected(reason)),
    }
}
