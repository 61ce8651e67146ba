//! One process of a container: its first, or one that was executed in it later.

use crate::reaper::Child;
use crate::stdio::{Names, Streams, drained};
use anyhow::{Context as _, Result};
use containerd_shim::protos::protobuf::MessageField;
use containerd_shim::protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim::util::convert_to_timestamp;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, pidfd_send_signal};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use time::OffsetDateTime;
use tokio::sync::watch;

/// The exit status of a process that was killed.
pub const KILLED: u32 = 137;

/// How a process ended.
#[derive(Debug, Clone, Copy)]
pub struct End {
    /// Its exit status, or 128 and the number of the signal.
    pub code: u32,
    pub at: OffsetDateTime,
}

/// A process that was made, and may have ended.
#[derive(Debug)]
pub struct Process {
    pub pid: Pid,
    pub names: Names,
    pidfd: Arc<OwnedFd>,
    streams: Mutex<Streams>,
    ended: watch::Receiver<Option<End>>,
    ending: watch::Sender<Option<End>>,
}

impl End {
    /// When, for containerd.
    pub fn timestamp(&self) -> MessageField<Timestamp> {
        MessageField::some(convert_to_timestamp(Some(self.at)))
    }
}

impl Process {
    pub fn new(child: &Child, names: Names, streams: Streams) -> Self {
        let (ending, ended) = watch::channel(None);
        Self { pid: child.pid, names, pidfd: child.pidfd.clone(), streams: Mutex::new(streams), ended, ending }
    }

    /// Its number, for containerd.
    pub fn number(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// How it ended, if it did.
    pub fn end(&self) -> Option<End> {
        *self.ended.borrow()
    }

    /// Waits for its end. Cancel safe.
    pub async fn wait(&self) -> End {
        let mut ended = self.ended.clone();
        // The other half lives as long as this.
        ended.wait_for(Option::is_some).await.ok().and_then(|end| *end).unwrap_or_else(|| End::now(255))
    }

    /// Awaits `child`, this process. What it wrote last is held until containerd has read it.
    pub async fn ended(&self, child: Child) -> End {
        let code = child.end().await.unwrap_or_else(|err| {
            log::error!("await process {}: {err}", self.pid.as_raw_nonzero());
            255
        });
        tokio::spawn(drained(self.streams().end()));
        End::now(code)
    }

    /// Tells those who wait for its end.
    pub fn tell(&self, end: End) {
        self.ending.send_replace(Some(end));
    }

    /// Sends a signal. False if it has ended, or if the signal has no name.
    ///
    /// # Errors
    /// The signal cannot be sent.
    pub fn signal(&self, signal: Signal) -> Result<bool> {
        if self.end().is_some() {
            return Ok(false);
        }
        match pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) => Ok(true),
            Err(Errno::SRCH) => Ok(false),
            Err(err) => Err(err).context("send the signal"),
        }
    }

    /// What the shim holds of its streams.
    pub fn streams(&self) -> MutexGuard<'_, Streams> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl End {
    /// An end just now.
    pub fn now(code: u32) -> Self {
        Self { code, at: OffsetDateTime::now_utc() }
    }
}
