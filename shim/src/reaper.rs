//! The ends of processes. Whatever outlives its parent below the shim becomes the shim's child: containers, since runc
//! makes them and goes, and the orphans of containers that have no process namespace of their own.

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, WaitIdStatus, pidfd_open, waitid};
use std::collections::HashSet;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::{fs, io};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{SignalKind, signal};

/// Knows which children somebody waits for, and reaps the others.
#[derive(Debug, Clone, Default)]
pub struct Reaper(Arc<Mutex<Children>>);

#[derive(Debug, Default)]
struct Children {
    /// Commands that run: they, and what they leave behind, are not known by number yet.
    commands: usize,
    watched: HashSet<Pid>,
}

/// A command runs: no unknown child is reaped until this goes.
#[derive(Debug)]
pub struct Command(Reaper);

/// A child that is awaited.
#[derive(Debug)]
pub struct Child {
    pub pid: Pid,
    pub pidfd: Arc<OwnedFd>,
    reaper: Reaper,
}

impl Reaper {
    /// Reaps orphans as they end, for ever.
    ///
    /// # Errors
    /// SIGCHLD cannot be received.
    pub async fn run(self) -> io::Result<()> {
        let mut ends = signal(SignalKind::child())?;
        while ends.recv().await.is_some() {
            self.sweep();
        }
        Ok(())
    }

    /// To be held while a command runs, until what it left behind is watched.
    pub fn command(&self) -> Command {
        self.with(|children| children.commands += 1);
        Command(self.clone())
    }

    /// Begins to watch a child, which may have ended already.
    ///
    /// # Errors
    /// There is no such process.
    pub fn watch(&self, pid: Pid, _command: &Command) -> io::Result<Child> {
        let pidfd = Arc::new(pidfd_open(pid, PidfdFlags::NONBLOCK)?);
        self.with(|children| children.watched.insert(pid));
        Ok(Child { pid, pidfd, reaper: self.clone() })
    }

    fn sweep(&self) {
        self.with(|children| {
            if children.commands == 0 {
                for orphan in own_children().filter(|pid| !children.watched.contains(pid)) {
                    // Nothing happens to one that still runs.
                    let _ = waitid(WaitId::Pid(orphan), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
                }
            }
        });
    }

    fn with<T>(&self, act: impl FnOnce(&mut Children) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Command {
    fn drop(&mut self) {
        self.0.with(|children| children.commands -= 1);
        self.0.sweep();
    }
}

impl Child {
    /// Waits for its end and gives its exit status, or 128 and the number of the signal that ended it.
    ///
    /// # Errors
    /// It is no child of this process.
    pub async fn end(self) -> io::Result<u32> {
        let pidfd = self.pidfd.as_fd().try_clone_to_owned()?;
        // SAFETY: the descriptor is owned by what is made here, and stays open as long.
        let readable = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
        loop {
            let mut ready = readable.readable().await?;
            match waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
                Ok(Some(status)) => return Ok(code_of(&status)),
                Ok(None) | Err(Errno::AGAIN) => ready.clear_ready(),
                Err(err) => return Err(err.into()),
            }
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.reaper.with(|children| children.watched.remove(&self.pid));
        self.reaper.sweep();
    }
}

/// The children of all threads, ended ones too; none where the kernel does not list them.
fn own_children() -> impl Iterator<Item = Pid> {
    let threads = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect::<Vec<_>>())
}

fn code_of(status: &WaitIdStatus) -> u32 {
    let code = status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal));
    code.and_then(|code| u32::try_from(code).ok()).unwrap_or(255)
}
