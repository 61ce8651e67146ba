//! The component replaced while the host runs: new messages use the new one, running ones finish on the old, and one
//! that does not fit changes nothing.

use crate::admin::Metrics;
use crate::component::{CacheArgs, Pin};
use crate::handler::Handler as _;
use crate::pool::Guest;
use anyhow::{Context, Result};
use std::cell::RefCell;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::select;
use tokio::signal::unix::Signal;
use tokio::sync::{oneshot, watch};
use tokio::time::{Interval, MissedTickBehavior, interval};

/// How often `--watch` looks at the component's file. It is loaded when two looks in a row find it the same, so that
/// whoever writes it has most likely come to the end.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// How much nicer than the shards the thread is that loads and compiles (nice(2)).
const NICENESS: i32 = 10;

/// The handler that new messages are given to: the one place that says so. All clones are the same place.
pub struct Current<H>(watch::Sender<Arc<H>>);

impl<H> Clone for Current<H> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<H> Current<H> {
    /// A place with this handler.
    pub fn new(handler: Arc<H>) -> Self {
        Self(watch::Sender::new(handler))
    }

    /// The handler that is there now.
    pub fn get(&self) -> Arc<H> {
        self.0.borrow().clone()
    }

    /// Puts another one there.
    pub fn replace(&self, handler: Arc<H>) {
        self.0.send_replace(handler);
    }

    /// A shard's view of the place.
    pub fn view(&self) -> View<H> {
        let mut changes = self.0.subscribe();
        let seen = changes.borrow_and_update().clone();
        View(RefCell::new((changes, seen)))
    }
}

/// The place as one shard sees it: looking there takes no lock as long as nothing has changed.
///
/// The view keeps what it saw last alive, so a shard without messages has to look now and then.
pub struct View<H>(RefCell<(watch::Receiver<Arc<H>>, Arc<H>)>);

impl<H> View<H> {
    /// The handler that is there now.
    pub fn get(&self) -> Arc<H> {
        let (changes, seen) = &mut *self.0.borrow_mut();
        // An error means that nobody is left who could replace it.
        if changes.has_changed().unwrap_or(false) {
            *seen = changes.borrow_and_update().clone();
        }
        seen.clone()
    }
}

/// Where a component comes from.
#[derive(Debug, Clone)]
pub struct Source {
    /// Its file.
    pub path: PathBuf,
    /// What becomes of its machine code.
    pub cache: CacheArgs,
    /// The only one that may run.
    pub pin: Option<Pin>,
}

/// Loads the component anew whenever it is told to.
pub struct Replacing {
    source: Source,
    current: Current<Guest>,
    metrics: Metrics,
    hangups: Signal,
    watching: Option<Watching>,
}

impl Replacing {
    /// Replaces what is in `current` at every signal of `hangups`, and with `watching` when the file changes.
    pub fn new(
        source: Source,
        current: Current<Guest>,
        metrics: Metrics,
        hangups: Signal,
        watching: Option<Watching>,
    ) -> Self {
        Self { source, current, metrics, hangups, watching }
    }

    /// Goes on until the future is dropped.
    pub async fn run(mut self) {
        loop {
            let path = &self.source.path;
            let changed = async {
                match &mut self.watching {
                    Some(watching) => watching.changed(path).await,
                    None => std::future::pending().await,
                }
            };
            let why = select! {
                _ = self.hangups.recv() => "SIGHUP",
                () = changed => "the file changed",
            };
            tracing::info!(component = %path.display(), "loading the component: {why}");
            let before = self.current.get();
            let outcome = match self.load(&before).await {
                Ok(Some(guest)) => {
                    let (component, digest) = (guest.name(), guest.digest().clone());
                    self.current.replace(Arc::new(guest));
                    tracing::info!(component, %digest, was = %before.digest(), "component replaced");
                    "replaced"
                }
                Ok(None) => {
                    tracing::info!(digest = %before.digest(), "the component is the one that runs already");
                    "unchanged"
                }
                Err(err) => {
                    tracing::error!(digest = %before.digest(), "component not replaced, the old one goes on: {err:#}");
                    "refused"
                }
            };
            self.metrics.component_load(outcome);
        }
    }

    /// The component that is in the file now, tried out; nothing, if it is the one that runs.
    async fn load(&self, before: &Arc<Guest>) -> Result<Option<Guest>> {
        let (sender, loaded) = oneshot::channel();
        let (source, before) = (self.source.clone(), before.clone());
        // On a thread of its own: a large component takes many seconds to compile, and a stop does not wait for it.
        std::thread::Builder::new()
            .name("load".into())
            .spawn(move || {
                if let Err(err) = rustix::process::nice(NICENESS) {
                    tracing::debug!("the component is loaded at ordinary priority: {err}");
                }
                // Nobody waits for it any more when the host stops.
                let _ = sender.send(load(&source, &before));
            })
            .context("start a thread that loads the component")?;
        let guest = loaded.await.context("loading the component broke off")??;
        if let Some(guest) = &guest {
            guest.try_out().await?;
        }
        Ok(guest)
    }
}

fn load(source: &Source, before: &Guest) -> Result<Option<Guest>> {
    let loaded = source.cache.load(before.engine(), &source.path, source.pin.as_ref())?;
    if loaded.digest == **before.digest() {
        return Ok(None);
    }
    before.with(loaded).map(Some)
}

/// Notices when a file changes, whether it is written anew, renamed into place, or behind a link that now leads
/// elsewhere, as Kubernetes replaces a ConfigMap.
pub struct Watching {
    looks: Interval,
    last: Option<Stamp>,
    loaded: Option<Stamp>,
}

/// What changes with a file: device and inode, size, times of the last change of content and of anything, in seconds and
/// nanoseconds.
type Stamp = (u64, u64, u64, (i64, i64), (i64, i64));

fn stamp(file: std::io::Result<std::fs::Metadata>) -> Option<Stamp> {
    let file = file.ok()?;
    let (content, anything) = ((file.mtime(), file.mtime_nsec()), (file.ctime(), file.ctime_nsec()));
    Some((file.dev(), file.ino(), file.size(), content, anything))
}

impl Watching {
    /// Begins with the file as it is now, before it is loaded for the first time.
    pub fn new(path: &Path) -> Self {
        let mut looks = interval(LOOK_INTERVAL);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let now = stamp(std::fs::metadata(path));
        Self { looks, last: now, loaded: now }
    }

    /// Waits until the file is there, another one than the last time, and has not changed since the last look.
    ///
    /// # Cancel safety
    /// Dropping the future loses no change.
    async fn changed(&mut self, path: &Path) {
        loop {
            self.looks.tick().await;
            let now = stamp(tokio::fs::metadata(path).await);
            let before = std::mem::replace(&mut self.last, now);
            if now.is_some() && now == before && now != self.loaded {
                self.loaded = now;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_follows_and_lets_go_of_what_was_replaced() {
        let first = Arc::new(1);
        let current = Current::new(first.clone());
        let view = current.view();
        assert_eq!((*current.get(), *view.get()), (1, 1));
        current.clone().replace(Arc::new(2));
        assert_eq!((*current.get(), Arc::strong_count(&first)), (2, 2), "the view still keeps it");
        assert_eq!((*view.get(), Arc::strong_count(&first)), (2, 1));
        drop(current);
        assert_eq!(*view.get(), 2);
    }
}
