//! The component replaced while the host runs: new messages use the new one, running ones finish on the old, and one
//! that does not fit changes nothing.

use crate::admin::Metrics;
use crate::component::{CacheArgs, Loaded, Pin};
use crate::handler::Handler;
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
use wasmtime::Engine;

/// How often `--watch` looks at the component's file. It is loaded when two looks in a row find it the same, so that
/// whoever writes it has most likely come to the end.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// How much nicer than the shards the thread is that loads and compiles (nice(2)).
const NICENESS: i32 = 10;

/// The handlers that new messages are given to, one for each shard that has begun: the one place that says so. They are
/// of the same component. All clones are the same place.
pub struct Current<H>(watch::Sender<Handlers<H>>);

/// One handler for each shard, in the order in which the shards began.
pub type Handlers<H> = Arc<[Arc<H>]>;

impl<H> Clone for Current<H> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<H> Current<H> {
    /// A place with the handler of the first shard.
    pub fn new(handler: Arc<H>) -> Self {
        Self(watch::Sender::new([handler].into()))
    }

    /// The handlers that are there now.
    pub fn all(&self) -> Handlers<H> {
        self.0.borrow().clone()
    }

    /// One of them: to others they are all the same.
    pub fn any(&self) -> Arc<H> {
        self.0.borrow()[0].clone()
    }

    /// The handlers of so many shards, when all of them have begun.
    async fn complete(&self, shards: usize) -> Handlers<H> {
        let mut changes = self.0.subscribe();
        let complete = changes.wait_for(|handlers| handlers.len() == shards).await;
        complete.map_or_else(|_| self.all(), |handlers| handlers.clone())
    }

    /// Puts others there, as many.
    pub fn replace(&self, handlers: Handlers<H>) {
        self.0.send_replace(handlers);
    }

    /// The place as one shard sees it, by the place of its handler among all.
    pub fn view(&self, place: usize) -> View<H> {
        let mut changes = self.0.subscribe();
        let seen = changes.borrow_and_update()[place].clone();
        View { place, seen: RefCell::new((changes, seen)) }
    }
}

impl<H: Handler> Current<H> {
    /// The place of the handler of the shard with this number, which has not begun before. It is made now, on the calling
    /// thread, but for the first shard's.
    ///
    /// Nothing is replaced before all shards have begun, so that all have the same component.
    ///
    /// # Errors
    /// As [`Handler::for_shard`].
    pub fn begin(&self, number: u32) -> Result<usize> {
        if number == 0 {
            return Ok(0);
        }
        let handler = Arc::new(self.any().for_shard(number)?);
        let mut place = 0;
        self.0.send_modify(|handlers| {
            place = handlers.len();
            *handlers = handlers.iter().cloned().chain([handler]).collect();
        });
        Ok(place)
    }
}

/// The place as one shard sees it: looking there takes no lock as long as nothing has changed.
///
/// The view keeps what it saw last alive, so a shard without messages has to look now and then.
pub struct View<H> {
    place: usize,
    seen: RefCell<(watch::Receiver<Handlers<H>>, Arc<H>)>,
}

impl<H> View<H> {
    /// The handler that is there now.
    pub fn get(&self) -> Arc<H> {
        let (changes, seen) = &mut *self.seen.borrow_mut();
        // An error means that nobody is left who could replace it.
        if changes.has_changed().unwrap_or(false) {
            *seen = changes.borrow_and_update()[self.place].clone();
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

impl Source {
    /// Loads it.
    ///
    /// # Errors
    /// As [`CacheArgs::load`].
    pub fn load(&self, engine: &Engine) -> Result<Loaded> {
        self.cache.load(engine, &self.path, self.pin.as_ref())
    }
}

/// Loads the component anew whenever it is told to.
pub struct Replacing {
    source: Source,
    current: Current<Guest>,
    shards: usize,
    metrics: Metrics,
    hangups: Signal,
    watching: Option<Watching>,
}

impl Replacing {
    /// Replaces what is in `current`, of so many shards, at every signal of `hangups`, and with `watching` when the file
    /// changes.
    pub fn new(
        source: Source,
        current: Current<Guest>,
        shards: usize,
        metrics: Metrics,
        hangups: Signal,
        watching: Option<Watching>,
    ) -> Self {
        Self { source, current, shards, metrics, hangups, watching }
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
            let before = self.current.complete(self.shards).await;
            let was = before[0].digest().clone();
            let outcome = match self.load(before).await {
                Ok(Some(guests)) => {
                    let (component, digest) = (guests[0].name(), guests[0].digest().clone());
                    self.current.replace(guests);
                    tracing::info!(component, %digest, %was, "component replaced");
                    "replaced"
                }
                Ok(None) => {
                    tracing::info!(digest = %was, "the component is the one that runs already");
                    "unchanged"
                }
                Err(err) => {
                    tracing::error!(digest = %was, "component not replaced, the old one goes on: {err:#}");
                    "refused"
                }
            };
            self.metrics.component_load(outcome);
        }
    }

    /// The component that is in the file now, tried out; nothing, if it is the one that runs.
    async fn load(&self, before: Handlers<Guest>) -> Result<Option<Handlers<Guest>>> {
        let source = self.source.clone();
        let guests = elsewhere(move || {
            if let Err(err) = rustix::process::nice(NICENESS) {
                tracing::debug!("the component is loaded at ordinary priority: {err}");
            }
            load(&source, &before)
        })
        .await?;
        if let Some(guests) = &guests {
            guests[0].try_out().await?;
        }
        Ok(guests)
    }
}

/// Has a component loaded on a thread of its own: a large one takes many seconds to compile, and a stop does not wait for
/// it.
///
/// # Errors
/// Those of `work`, and that the thread cannot be had or breaks off.
pub async fn elsewhere<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let (sender, loaded) = oneshot::channel();
    std::thread::Builder::new()
        .name("load".into())
        .spawn(move || {
            // Nobody waits for it any more when the host stops.
            let _ = sender.send(work());
        })
        .context("start a thread that loads the component")?;
    loaded.await.context("loading the component broke off")?
}

fn load(source: &Source, before: &[Arc<Guest>]) -> Result<Option<Handlers<Guest>>> {
    let loaded = Arc::new(source.load(before[0].engine())?);
    if loaded.digest == **before[0].digest() {
        return Ok(None);
    }
    before.iter().map(|guest| guest.with(loaded.clone()).map(Arc::new)).collect::<Result<_>>().map(Some)
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
    use crate::handler::{PoolUse, Run};
    use crate::interface::Message;
    use futures::FutureExt as _;
    use std::future::Pending;

    /// A handler that knows whose it is. There is none for shard 9.
    struct Of(u32);

    impl Handler for Of {
        type Call = Pending<Run>;

        fn name(&self) -> String {
            self.0.to_string()
        }

        fn digest(&self) -> &Arc<str> {
            unreachable!("nobody asks")
        }

        fn for_shard(&self, number: u32) -> Result<Self> {
            (number < 9).then_some(Self(number)).context("no room")
        }

        fn slots(&self) -> u32 {
            1
        }

        fn triage(self: &Arc<Self>, _: Arc<Message>) -> Self::Call {
            std::future::pending()
        }

        fn pool_use(&self) -> Option<PoolUse> {
            None
        }
    }

    /// Shards begin in any order, each with a handler of its own, and nothing is replaced before all have.
    #[test]
    fn every_shard_begins_with_a_handler_of_its_own() -> Result<()> {
        let current = Current::new(Arc::new(Of(0)));
        let places = [current.begin(2)?, current.begin(0)?, current.begin(1)?];
        assert_eq!(places, [1, 0, 2]);
        assert_eq!(places.map(|place| current.view(place).get().0), [2, 0, 1]);
        assert!(current.begin(9).is_err());
        assert!(current.complete(4).now_or_never().is_none(), "one is missing");
        assert_eq!(current.complete(3).now_or_never().map(|handlers| handlers.len()), Some(3));
        Ok(())
    }

    #[test]
    fn a_view_follows_and_lets_go_of_what_was_replaced() {
        let first: Handlers<i32> = Arc::new([Arc::new(0), Arc::new(1)]);
        let of_shard = Arc::downgrade(&first[1]);
        let current = Current::new(first[0].clone());
        current.replace(first);
        let view = current.view(1);
        assert_eq!((*current.any(), *view.get()), (0, 1));
        current.clone().replace(Arc::new([Arc::new(2), Arc::new(3)]));
        assert_eq!((*current.any(), of_shard.strong_count()), (2, 1), "the view still keeps it");
        assert_eq!((*view.get(), of_shard.strong_count()), (3, 0));
        drop(current);
        assert_eq!(*view.get(), 3);
    }
}
