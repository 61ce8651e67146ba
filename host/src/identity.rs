//! Whether the consumer is still the one that a shard's messages came from.
//!
//! A stream or consumer that is deleted and made again begins to count anew. The server takes an acknowledgement by
//! its sequence alone, so one that comes late would settle a message of the new stream that nobody has looked at.

use crate::names::Names;
use crate::unreadable::Alarm;
use async_nats::jetstream::consumer::Info;
use async_nats::jetstream::response::Response;
use async_nats::jetstream::{Context, ErrorCode};
use async_nats::{Client, SubscribeError};
use futures::future::{BoxFuture, Shared};
use futures::stream::select;
use futures::{FutureExt as _, StreamExt as _};
use serde_json::json;
use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

/// How long a look at the consumer holds if no pull waited at the server before it. A pull that waits is told of its end. Others
/// hear of it, see [`Doubts`], which not every login may, and not every account passes on.
const SURE_FOR: Duration = Duration::from_secs(1);

/// The first and the longest wait before the consumer is looked up again after a failure.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// How often a connection was lost.
#[derive(Default)]
pub struct Losses {
    count: AtomicU64,
    alarm: Option<Alarm>,
}

impl Losses {
    /// Of a shard's connection, which a message may have cut: raises `alarm` at each.
    pub fn with_alarm(alarm: Alarm) -> Self {
        Self { count: AtomicU64::new(0), alarm: Some(alarm) }
    }

    /// Counts one.
    pub fn add(&self) {
        self.count.fetch_add(1, Ordering::Relaxed);
        if let Some(alarm) = &self.alarm {
            alarm.raise();
        }
    }

    /// How often so far.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}

/// How often there was reason to look at a consumer: a lost connection, or the server's word that the consumer was deleted,
/// with its stream or by itself.
///
/// A server by itself sends that word, JetStream's advisory, as it answers whoever deleted the consumer: of 1,600 words the
/// latest came 1.6 ms after the answer. In a cluster the consumer's does not come when another server leads the stream that is
/// deleted, but the stream's does.
pub struct Doubts {
    losses: Arc<Losses>,
    others: Arc<AtomicU64>,
    _listening: AbortOnDropHandle<()>,
}

impl Doubts {
    /// Of the consumer with these names, which has to be looked up afterwards, over the same connection, so that no word goes
    /// unheard.
    ///
    /// # Errors
    /// The connection is closed. If the login may not listen, the client says so in an event.
    pub async fn of(client: &Client, names: &Names, losses: Arc<Losses>) -> Result<Self, SubscribeError> {
        let listen = |what: String| client.subscribe(format!("$JS.EVENT.ADVISORY.{what}"));
        let consumer = listen(format!("CONSUMER.DELETED.{}.{}", names.stream, names.consumer)).await?;
        let stream = listen(format!("STREAM.DELETED.{}", names.stream)).await?;
        let mut words = select(consumer, stream);
        let others = Arc::<AtomicU64>::default();
        let heard = others.clone();
        let listening = async move {
            while words.next().await.is_some() {
                heard.fetch_add(1, Ordering::Relaxed);
            }
        };
        Ok(Self { losses, others, _listening: AbortOnDropHandle::new(tokio::spawn(listening)) })
    }

    /// How often so far.
    pub fn count(&self) -> u64 {
        self.losses.count() + self.others.load(Ordering::Relaxed)
    }

    fn add(&self) {
        self.others.fetch_add(1, Ordering::Relaxed);
    }
}

/// A shard's knowledge of its consumer's identity.
pub struct Identity {
    jetstream: Context,
    names: Names,
    /// When the consumer was made, in nanoseconds since 1970: what tells it from another of its name.
    created: i128,
    doubts: Arc<Doubts>,
    /// When it was last certain, and after how many doubts.
    sure: Cell<Option<(Instant, u64)>>,
    /// Since when the pulls are sent of which one waits at the server, and when that was so.
    waiting: Cell<Option<(Instant, Instant)>>,
    gone: Cell<bool>,
    /// The look at the consumer that is under way, shared by all who wait for it.
    look: RefCell<Option<Shared<BoxFuture<'static, Look>>>>,
}

/// What a look at the consumer found.
#[derive(Clone, Copy)]
struct Look {
    is_same: bool,
    at: Instant,
    doubts: u64,
}

impl Identity {
    /// Of a consumer that was looked up, and when and after how many of the doubts that was asked.
    pub fn new(jetstream: Context, names: Names, created: i128, doubts: Doubts, asked: (Instant, u64)) -> Self {
        let sure = Cell::new(Some(asked));
        let (waiting, gone, look) = (Cell::default(), Cell::default(), RefCell::default());
        Self { jetstream, names, created, doubts: Arc::new(doubts), sure, waiting, gone, look }
    }

    /// Says since when the pulls are sent of which one waits at the server, if one does. It has to be said over and over.
    pub fn set_waiting(&self, since: Option<Instant>) {
        let now = Instant::now();
        if since.is_none() && self.is_vouched_for() {
            // What waited until now for this consumer shows that it was there.
            self.sure.set(Some((now, self.doubts.count())));
        }
        self.waiting.set(since.map(|since| (since, now)));
    }

    /// There is reason to look.
    pub fn doubt(&self) {
        self.doubts.add();
    }

    /// Whether the consumer is the same for all that is known here and now.
    pub fn is_sure(&self) -> bool {
        let recent = |(at, _): (Instant, u64)| at.elapsed() < SURE_FOR;
        let is_recent = self.is_certain() && self.sure.get().is_some_and(recent);
        !self.gone.get() && (is_recent || self.is_vouched_for())
    }

    /// Whether there is something to find out with [`Identity::holds`].
    pub fn is_in_doubt(&self) -> bool {
        !self.gone.get() && !self.is_sure()
    }

    /// Whether the consumer is the same; looks if that is in doubt, for as long as the server is away.
    ///
    /// # Cancel safety
    /// The look goes on with the next call.
    pub async fn holds(&self) -> bool {
        loop {
            if !self.is_in_doubt() {
                return !self.gone.get();
            }
            let begin = || {
                let (jetstream, names) = (self.jetstream.clone(), self.names.clone());
                look(jetstream, names, self.created, self.doubts.clone()).boxed().shared()
            };
            let look = self.look.borrow_mut().get_or_insert_with(begin).clone();
            let Look { is_same, at, doubts } = look.clone().await;
            // Only the first of those who waited for it takes note: the others may come to it when there is a later one.
            if self.look.borrow_mut().take_if(|current| current.ptr_eq(&look)).is_some() {
                self.gone.set(!is_same);
                self.sure.set(Some((at, doubts)));
            }
            // However long the answer took: else nothing would go on at a server that takes longer than a look holds.
            if is_same && self.is_certain() {
                return true;
            }
        }
    }

    /// Whether a pull waits at the server of which a later look has shown that it waits for this consumer, even if it is the
    /// newest. A host that stood still does not know.
    fn is_vouched_for(&self) -> bool {
        let later = |since| self.sure.get().is_some_and(|(at, _)| at >= since);
        let holds = |(since, told): (Instant, Instant)| later(since) && told.elapsed() < SURE_FOR;
        self.is_certain() && self.waiting.get().is_some_and(holds)
    }

    /// Whether there was no reason to look since it was last certain.
    fn is_certain(&self) -> bool {
        self.sure.get().is_some_and(|(_, doubts)| doubts == self.doubts.count())
    }
}

/// Asks for the consumer until there is an answer.
async fn look(jetstream: Context, names: Names, created: i128, doubts: Arc<Doubts>) -> Look {
    let subject = format!("CONSUMER.INFO.{}.{}", names.stream, names.consumer);
    let mut wait = BACK_OFF.0;
    loop {
        // What is true at the answer was so at the question: a consumer's end is not undone. What gives reason to look after
        // the question may have come after the answer.
        let (at, doubts) = (Instant::now(), doubts.count());
        let is_same = match jetstream.request(subject.clone(), &json!({})).await {
            Ok(Response::Ok(Info { created: now, .. })) => Some(now.unix_timestamp_nanos() == created),
            Ok(Response::Err { error }) => {
                let missing = [ErrorCode::CONSUMER_NOT_FOUND, ErrorCode::STREAM_NOT_FOUND];
                missing.contains(&error.error_code()).then_some(false)
            }
            Err(_) => None,
        };
        match is_same {
            Some(is_same) => return Look { is_same, at, doubts },
            None => sleep(wait).await,
        }
        wait = (wait * 2).min(BACK_OFF.1);
    }
}
