//! The loop, and the path of one message through it.
//!
//! A host is a handful of shards that share nothing but the component and the metrics: each is a thread with its
//! own runtime, connection, pulls and part of the slots. A shard polls its guests in place, so a guest that only
//! computes runs to its end without a task switch, and one that waits lets the others go on.

use crate::admin::{Condition, Health, Metrics, Stage, Stages};
use crate::batch::Batch;
use crate::cli::counted;
use crate::handler::Handler;
use crate::identity::{Doubts, Identity, Losses};
use crate::interface::{Message, Verdict};
use crate::lane::SlowLane;
use crate::letter::Origin;
use crate::names::Names;
use crate::nats::{ConnectError, Nats, refusal};
use crate::parking::Parking;
use crate::replacement::{Current, View};
use crate::settle::{DeadReason, Policy, Settlement, admit, settle};
use crate::sink::{Cause, Sink, StoreError, Stored};
use crate::source::{Delivery, Event, Source};
use crate::turns::turn;
use crate::unreadable::Alarm;
use anyhow::{Context, Result, ensure};
use async_nats::Client;
use async_nats::jetstream::consumer::Info;
use async_nats::jetstream::message::AckKind;
use async_nats::jetstream::stream;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use slab::Slab;
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant, SystemTime};
use tokio::select;
use tokio::sync::{Semaphore, SemaphorePermit, watch};
use tokio::time::{MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;

/// How often a shard looks after the messages it holds and hands over its metrics.
const BEAT: Duration = Duration::from_millis(250);

/// The first and the longest wait before something that failed is repeated: storing, connecting, looking up.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// How long the first shard has the processors and the server for itself when a host starts: the others connect, and make
/// their pools, when it has most likely settled the message that the host was started for.
const FIRST_ALONE: Duration = Duration::from_millis(10);

/// How long a shard that could not fetch waits before it looks for its consumer again.
const RETURN_AFTER: Duration = Duration::from_secs(1);

/// Longest wait for an answer of JetStream's, a PubAck for example.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// What all shards share, and what does not change while the host runs.
pub struct Host<H> {
    /// What runs on messages, as soon as it is loaded. If its other end is dropped before, shards come to their end.
    pub work: watch::Receiver<Option<Work<H>>>,
    /// Where NATS is.
    pub nats: Nats,
    /// The streams, the consumer and the subjects.
    pub names: Names,
    /// When to try again and when to give up.
    pub policy: Policy,
    /// Most messages that one shard holds: fetched and not settled.
    pub max_in_flight: usize,
    /// What has to be so for the shard to work.
    pub conditions: Conditions,
    /// Raised when a connection is lost, perhaps through a message.
    pub alarm: Alarm,
    /// When and how to stop.
    pub stop: Stop,
}

/// What runs on messages.
pub struct Work<H> {
    /// The handler of each shard that has begun, until it is replaced.
    pub current: Current<H>,
    /// The metrics.
    pub metrics: Metrics,
    /// Most runs at the same time, over all shards, as far as there is room.
    pub slots: u32,
}

impl<H> Clone for Work<H> {
    fn clone(&self) -> Self {
        Self { current: self.current.clone(), metrics: self.metrics.clone(), slots: self.slots }
    }
}

/// The two moments of stopping.
#[derive(Clone, Default)]
pub struct Stop {
    /// From now on nothing is fetched or begun.
    pub drain: CancellationToken,
    /// From now on nothing is waited for.
    pub now: CancellationToken,
}

/// What has to be so for a shard to work, and so for its host to be ready.
pub struct Conditions {
    connected: Condition,
    found: Condition,
    verdicts: Store,
    dead_letters: Store,
}

impl Conditions {
    /// Those of a shard that has yet to connect. Made before the shard's thread is: a host whose shards have not begun is
    /// not ready.
    pub fn new(shard: u32, health: &Health) -> Self {
        Self {
            connected: health.condition(&format!("shard {shard}: no connection to NATS")),
            found: health.condition(&format!("shard {shard}: no consumer to pull from")),
            verdicts: Store::new("verdicts", shard, health),
            dead_letters: Store::new("dead letters", shard, health),
        }
    }
}

/// What a shard knows of its consumer.
pub struct Consumer {
    /// The consumer, as the server describes it.
    pub info: Info,
    /// When its stream was created, in seconds since 1970: part of every message's id.
    pub stream_created: i64,
    /// The settings of its stream.
    pub stream: stream::Config,
    /// The settings of the verdict stream.
    pub verdict_stream: stream::Config,
    /// Where retries wait that are due late; nothing where they have to wait at the consumer.
    pub parking: Option<Parking>,
}

impl Consumer {
    /// Looks the consumer and its streams up.
    ///
    /// # Errors
    /// One of them is missing, named with the command that makes it, or the server does not answer.
    pub async fn look_up(jetstream: &async_nats::jetstream::Context, names: &Names) -> Result<Self> {
        let consumer = async {
            let stream = jetstream
                .get_stream(&names.stream)
                .await
                .with_context(|| format!("find stream {}; `host provision` makes it", names.stream))?;
            let info = stream.consumer_info(&names.consumer).await.with_context(|| {
                format!("find consumer {} of stream {}; `host provision` makes it", names.consumer, names.stream)
            })?;
            anyhow::Ok((stream, info))
        };
        let (verdicts, dead) = (jetstream.get_stream(&names.verdict_stream), jetstream.get_stream(&names.dead_stream));
        let (consumer, verdicts, dead) = tokio::join!(consumer, verdicts, dead);
        let (stream, info) = consumer?;
        let verdicts = verdicts
            .with_context(|| format!("find verdict stream {}; `host provision` makes it", names.verdict_stream))?;
        dead.with_context(|| format!("find dead-letter stream {}; `host provision` makes it", names.dead_stream))?;
        let created = stream.cached_info().created;
        let parking = Parking::look_up(jetstream, names, &stream.cached_info().config);
        let (now, parking) = tokio::join!(stream.get_info(), parking);
        let now = now.with_context(|| format!("look stream {} up again", names.stream))?;
        ensure!(now.created == created, "stream {} is just being made again", names.stream);
        Ok(Self {
            info,
            stream_created: created.unix_timestamp(),
            stream: now.config,
            verdict_stream: verdicts.cached_info().config.clone(),
            parking,
        })
    }
}

/// Connects, as often as it takes. `losses` counts how often the connection is lost afterwards.
///
/// # Errors
/// The server refuses the credentials, which repeating does not mend. Nothing, if `stop` comes first.
pub async fn connect_patiently(
    nats: &Nats,
    name: &str,
    losses: Arc<Losses>,
    connected: Condition,
    stop: &CancellationToken,
) -> Result<Option<Client>, ConnectError> {
    let on_event = {
        let (connected, name) = (connected.clone(), name.to_string());
        move |event: async_nats::Event| match event {
            async_nats::Event::Connected => {
                if connected.set(true) && losses.count() > 0 {
                    tracing::info!(connection = name, "connected to NATS again");
                }
            }
            async_nats::Event::Disconnected => {
                losses.add();
                connected.set(false);
                tracing::warn!(connection = name, "connection to NATS lost; reconnecting");
            }
            event => match refusal(&event) {
                Some(reason) => tracing::error!(connection = name, "NATS refuses: {reason}"),
                None => tracing::debug!(connection = name, "NATS: {event}"),
            },
        }
    };
    let mut wait = BACK_OFF.0;
    loop {
        match nats.connect(name, on_event.clone()).await {
            Ok(client) => {
                connected.set(true);
                return Ok(Some(client));
            }
            Err(err @ ConnectError::Refused { .. }) => return Err(err),
            Err(err) => {
                tracing::warn!("{err}; trying again in {wait:?}");
                select! {
                    () = sleep(wait) => wait = (wait * 2).min(BACK_OFF.1),
                    () = stop.cancelled() => return Ok(None),
                }
            }
        }
    }
}

impl<H: Handler> Host<H> {
    /// Runs one shard on the calling thread, until [`Stop`] or an error that repeating does not mend. Gives the number
    /// of messages that were not done in time at the stop.
    ///
    /// # Errors
    /// The server refuses the credentials, or there is no room for the shard's handler.
    pub fn run_shard(self, number: u32) -> Result<usize> {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a shard's runtime")?;
        runtime.block_on(async {
            let Conditions { connected, found, verdicts, dead_letters } = &self.conditions;
            let losses = Arc::new(Losses::with_alarm(self.alarm.clone()));
            let name = format!("mailroom shard {number}");
            if number > 0 {
                sleep(FIRST_ALONE).await;
            }
            let connect = || connect_patiently(&self.nats, &name, losses.clone(), connected.clone(), &self.stop.drain);
            let Some(mut client) = connect().await? else { return Ok(0) };
            let mut wait = BACK_OFF.0;
            let (mut place, mut before) = (None, None);
            while !self.stop.drain.is_cancelled() {
                if is_broken_off(&client) {
                    connected.set(false);
                    losses.add();
                    tracing::error!(connection = name, "the NATS client broke off; connecting anew");
                    let Some(anew) = connect().await? else { break };
                    client = anew;
                }
                let jetstream = self.nats.jetstream(client.clone(), REQUEST_TIMEOUT);
                let Ok(doubts) = Doubts::of(&client, &self.names, losses.clone()).await else { continue };
                let asked = (Instant::now(), doubts.count());
                let consumer = match Consumer::look_up(&jetstream, &self.names).await {
                    Ok(consumer) => consumer,
                    Err(err) => {
                        tracing::error!("{err:#}; trying again in {wait:?}");
                        select! {
                            () = sleep(wait) => wait = (wait * 2).min(BACK_OFF.1),
                            () = self.stop.drain.cancelled() => {}
                        }
                        continue;
                    }
                };
                let api = self.nats.api_prefix();
                let (created, names) = (consumer.stream_created, self.names.clone());
                let opening = Source::open(client.clone(), api, created, &consumer.info, names, losses.clone());
                let Ok(source) = opening.await else { continue };
                let made = consumer.info.created.unix_timestamp_nanos();
                let Some(Work { current, metrics, .. }) = self.loaded().await else { break };
                let guest = match place {
                    Some(place) => current.view(place),
                    None => current.view(*place.insert(current.begin(number)?)),
                };
                let slots = guest.get().slots() as usize;
                wait = BACK_OFF.0;
                found.set(true);
                if let Some(Served { gone, .. }) = before {
                    tracing::info!("shard {number}: fetching goes on; {} returned as gone", counted(gone, "message"));
                }
                let served = Shard {
                    guest,
                    sink: Sink::new(jetstream.clone(), self.names.clone()),
                    client: client.clone(),
                    policy: &self.policy,
                    max_in_flight: self.max_in_flight,
                    stop: &self.stop,
                    identity: Identity::new(jetstream.clone(), self.names.clone(), made, doubts, asked),
                    alarm: &self.alarm,
                    found,
                    slots: Semaphore::new(slots),
                    slots_total: slots,
                    lane: SlowLane::new(number, slots),
                    stages: Stages::new(&metrics),
                    held: RefCell::default(),
                    verdicts,
                    dead_letters,
                    gone: Cell::new(0),
                    half_ack_wait: consumer.info.config.ack_wait / 2,
                    half_window: consumer.verdict_stream.duplicate_window / 2,
                    parking: consumer.parking,
                    parks: Cell::new(true),
                    batch: Batch::default(),
                }
                .serve(source)
                .await;
                before = Some(served);
                if self.stop.drain.is_cancelled() {
                    break;
                }
                found.set(false);
                // Whatever kept the shard from fetching may still do so, though the consumer is there.
                select! {
                    () = sleep(RETURN_AFTER) => {}
                    () = self.stop.drain.cancelled() => {}
                }
            }
            // Acknowledgements are only queued until the connection has written them.
            let _ = tokio::time::timeout(REQUEST_TIMEOUT, client.flush()).await;
            Ok(before.map_or(0, |served| served.not_done))
        })
    }
}

impl<H> Host<H> {
    /// What runs on messages. Nothing, if the host stops before it is loaded.
    async fn loaded(&self) -> Option<Work<H>> {
        let mut work = self.work.clone();
        select! {
            loaded = work.wait_for(Option::is_some) => loaded.ok()?.clone(),
            () = self.stop.drain.cancelled() => None,
        }
    }
}

/// Whether nothing serves the client any more. That does not mend itself, and the client does not say so.
pub fn is_broken_off(client: &Client) -> bool {
    matches!(client.flush().now_or_never(), Some(Err(_)))
}

struct Shard<'a, H: Handler> {
    guest: View<H>,
    sink: Sink,
    client: Client,
    policy: &'a Policy,
    max_in_flight: usize,
    stop: &'a Stop,
    identity: Identity,
    alarm: &'a Alarm,
    found: &'a Condition,
    slots: Semaphore,
    slots_total: usize,
    lane: SlowLane<H::Call>,
    stages: Stages,
    /// The messages that the shard holds; the server has to hear of each before `ack_wait` is over.
    held: RefCell<Slab<Held>>,
    verdicts: &'a Store,
    dead_letters: &'a Store,
    /// Messages that could not be settled since their consumer was gone.
    gone: Cell<u64>,
    half_ack_wait: Duration,
    half_window: Duration,
    parking: Option<Parking>,
    /// Whether the last retry that should be parked was.
    parks: Cell<bool>,
    batch: Batch,
}

/// Where results of one kind go, as far as a shard knows.
struct Store {
    what: &'static str,
    works: Condition,
    /// Results that could not be stored and are tried again; nothing is fetched meanwhile.
    failing: Cell<usize>,
}

impl Store {
    /// One that is taken to work until it fails.
    fn new(what: &'static str, shard: u32, health: &Health) -> Self {
        let works = health.condition(&format!("shard {shard}: {what} cannot be stored"));
        works.set(true);
        Self { what, works, failing: Cell::new(0) }
    }
}

/// What is left when a shard has served a consumer to its own end or to the consumer's.
#[derive(Default)]
struct Served {
    /// Messages that could not be settled since their consumer was gone.
    gone: u64,
    /// Messages handed back at the end of the grace period.
    not_done: usize,
}

struct Held {
    reply: async_nats::Subject,
    /// When the server last heard of the message.
    touched: Instant,
}

impl<H: Handler> Shard<'_, H> {
    /// Fetches and settles messages until the host stops, the consumer is gone or the client breaks off.
    async fn serve(&self, mut source: Source) -> Served {
        let mut running = FuturesUnordered::new();
        let mut beat = interval(BEAT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        'fetch: loop {
            let mut room = if self.is_failing() { 0 } else { self.max_in_flight.saturating_sub(running.len()) };
            if self.alarm.is_raised() {
                room = room.min(1);
            }
            self.identity.set_waiting(source.waiting_since());
            select! {
                biased;
                () = self.stop.drain.cancelled() => break,
                _ = beat.tick() => {
                    // What waits for an answer does not hear of it.
                    if self.is_connected() && is_broken_off(&self.client) {
                        return self.broken_off();
                    }
                    self.beat(running.len()).await;
                }
                Some(()) = self.done(&mut running) => {}
                event = self.next(&mut source, room) => {
                    let Ok(event) = event else { return self.broken_off() };
                    let mut event = Some(event);
                    while let Some(some) = event {
                        match some {
                            Event::Delivery(delivery) => running.push(self.process(delivery)),
                            Event::Pulls => {}
                            Event::Doubt => {
                                self.identity.doubt();
                                break;
                            }
                            Event::Trouble(trouble) => {
                                tracing::error!("cannot fetch messages: {trouble}");
                                self.found.set(false);
                                self.identity.doubt();
                                break 'fetch;
                            }
                        }
                        event = source.ready();
                    }
                }
            }
        }
        self.identity.set_waiting(None);
        let from_another = source.is_doubtful();
        let not_begun = source.close().await;
        let hand_back = async {
            for delivery in &not_begun {
                if from_another {
                    // It is of the stream that is there now, unlike all that was begun.
                    let _ = delivery.acknowledge(&self.client, AckKind::Nak(None)).await;
                } else {
                    self.hand_back(delivery).await;
                }
            }
        };
        // Without a connection the client's buffer may be full; the server delivers again then, a little later.
        let _ = tokio::time::timeout(REQUEST_TIMEOUT, hand_back).await;
        self.finish(&mut running).await;
        // What still runs is on the list; its guards find nothing left to take off it.
        let left: Vec<Held> = self.held.borrow_mut().drain().collect();
        drop(running);
        let not_done = left.len();
        let hand_back = async {
            for held in left {
                if self.identity.holds().await {
                    let _ = self.client.publish(held.reply, AckKind::Nak(None).into()).await;
                }
                self.stages.settled("returned", "stop");
            }
        };
        let _ = tokio::time::timeout(REQUEST_TIMEOUT, hand_back).await;
        self.stages.flush(0, 0, 0);
        Served { gone: self.gone.get(), not_done }
    }

    /// The client broke off: nothing that runs can be stored or acknowledged.
    fn broken_off(&self) -> Served {
        self.found.set(false);
        self.stages.flush(0, 0, 0);
        Served::default()
    }

    /// The next event, of the same consumer as all before.
    async fn next(&self, source: &mut Source, room: usize) -> Result<Event> {
        if !self.identity.holds().await {
            return Ok(Event::Trouble("the consumer was deleted or made again".into()));
        }
        source.next(room).await
    }

    /// Lets what runs come to its end, or to the end of the grace period.
    async fn finish(&self, running: &mut FuturesUnordered<impl Future<Output = ()>>) {
        let mut beat = interval(BEAT);
        loop {
            select! {
                biased;
                () = self.stop.now.cancelled() => break,
                _ = beat.tick() => {
                    if is_broken_off(&self.client) {
                        break;
                    }
                    self.beat(running.len()).await;
                }
                done = self.done(running) => if done.is_none() { break },
                // So that the next beat knows whom it tells of the long ones.
                _ = self.identity.holds(), if self.identity.is_in_doubt() => {}
            }
        }
        self.beat(running.len()).await;
    }

    /// The next message that is done, if any is on its way.
    async fn done(&self, running: &mut FuturesUnordered<impl Future<Output = ()>>) -> Option<()> {
        poll_fn(|context| {
            loop {
                match running.poll_next_unpin(context) {
                    Poll::Pending if self.batch.release() => {}
                    done => return done,
                }
            }
        })
        .await
    }

    /// The path of one message, from its delivery to its settlement.
    ///
    /// As large as the largest of what it awaits, for every message in flight; so what few messages need is boxed.
    async fn process(&self, mut delivery: Box<Delivery>) {
        let _held = self.hold(&delivery);

        let replayed = match &delivery.origin {
            Origin::Sender | Origin::Odd(_) => false,
            Origin::Replay { .. } => true,
            Origin::Elsewhere => return self.acknowledge(&delivery, AckKind::Ack, "elsewhere", "").await,
        };
        // It may have its verdict already, if the acknowledgement was lost or a replay came twice.
        if (delivery.count > 1 || replayed) && self.has_verdict(&delivery.message).await {
            return self.acknowledge(&delivery, AckKind::Ack, "duplicate", "").await;
        }
        // A host that ended between parking a message and acknowledging it leaves it in both places.
        if let Origin::Replay { letter, parked: true, .. } = &delivery.origin
            && self.has_letter(letter).await
        {
            return self.acknowledge(&delivery, AckKind::Ack, "duplicate", "").await;
        }
        let not_run = |settlement| (settlement, self.guest.get().digest().clone());
        let (settlement, component) = match (&delivery.origin, admit(delivery.count, delivery.bytes(), self.policy)) {
            (Origin::Odd(why), _) => not_run(Settlement::Dead(DeadReason::REPLAY, why.clone())),
            (_, Some(dead)) => not_run(dead),
            (_, None) => {
                let Some(settled) = self.run(&delivery).await else { return };
                delivery.forget_copy();
                self.batch.complete().await;
                settled
            }
        };

        // While this host stood still, another may have come to a verdict where this one's run failed.
        let may_be_elsewhere = delivery.arrived.elapsed() > self.half_ack_wait;
        if may_be_elsewhere && matches!(settlement, Settlement::Dead(..)) && self.has_verdict(&delivery.message).await {
            return self.acknowledge(&delivery, AckKind::Ack, "duplicate", "").await;
        }

        let started = Instant::now();
        match settlement {
            Settlement::Verdict(verdict) => {
                let attempt = || self.store(&delivery, &verdict, &component);
                let stored = match self.persist(self.verdicts, "store a verdict", attempt).await {
                    Ok(stored) => stored,
                    Err(err) => return self.unstorable(&delivery, "verdict", &err).await,
                };
                self.stages.observe(Stage::Publish, started.elapsed());
                let outcome = if stored == Stored::Now { "verdict" } else { "duplicate" };
                self.acknowledge(&delivery, AckKind::Ack, outcome, "").await;
            }
            Settlement::Again(wait, reason, detail) => {
                let id = &delivery.message.id;
                tracing::debug!(id, delivery = delivery.count, "{}: {detail}; again in {wait:?}", reason.name());
                let kind = if !may_be_elsewhere && Box::pin(self.park(&delivery, wait)).await {
                    AckKind::Ack
                } else {
                    AckKind::Nak(Some(wait))
                };
                self.acknowledge(&delivery, kind, "retry", reason.name()).await;
            }
            Settlement::Dead(reason, detail) => {
                let cause = Cause { reason, detail: &detail, component: &component };
                let attempt = || Box::pin(self.sink.dead(&delivery, cause));
                match self.persist(self.dead_letters, "store a dead letter", attempt).await {
                    Ok(_) => self.stages.observe(Stage::Publish, started.elapsed()),
                    Err(err) => return self.unstorable(&delivery, "dead letter", &err).await,
                }
                let id = &delivery.message.id;
                tracing::debug!(id, delivery = delivery.count, "dead letter: {}: {detail}", reason.name());
                self.acknowledge(&delivery, AckKind::Term, "dead", reason.name()).await;
            }
        }
    }

    /// Runs the guest on the message in a free slot: what is to become of it, and the digest of what ran. Nothing, if
    /// the host stops before it could begin.
    async fn run(&self, delivery: &Delivery) -> Option<(Settlement, Arc<str>)> {
        let slot = self.slot(delivery).await?;
        self.stages.observe(Stage::QueueWait, delivery.arrived.elapsed());
        let mut guest = self.guest.get();
        let mut call = guest.triage(delivery.message.clone());
        let run = match turn(&mut call).await {
            Some(run) => run,
            None => {
                self.stages.shared().slow_guests.inc();
                match self.lane.try_enter() {
                    Some(place) => place.finish(call).await?,
                    None => {
                        drop((call, guest, slot));
                        let place = self.lane.enter().await?;
                        let _slot = self.slot(delivery).await?;
                        guest = self.guest.get();
                        place.finish(guest.triage(delivery.message.clone())).await?
                    }
                }
            }
        };
        self.stages.observe(Stage::Instantiate, run.instantiate);
        self.stages.observe(Stage::Guest, run.guest);
        Some((settle(run.outcome, delivery.count, self.policy, Self::spread()), guest.digest().clone()))
    }

    /// A free slot. Nothing, if the host stops first: the message is handed back then.
    async fn slot(&self, delivery: &Delivery) -> Option<SemaphorePermit<'_>> {
        let slot = self.slots.acquire().await.ok()?;
        if self.stop.drain.is_cancelled() {
            self.hand_back(delivery).await;
            return None;
        }
        Some(slot)
    }

    /// Tries once to store the verdict. The server knows a second one by its message id only for a while; after half
    /// of it every attempt looks first, for another host may have had the message meanwhile.
    async fn store(&self, delivery: &Delivery, verdict: &Verdict, component: &str) -> Result<Stored, StoreError> {
        let late = delivery.arrived.elapsed() > self.half_window;
        if late && Box::pin(self.sink.has_verdict(&delivery.message.id)).await? {
            return Ok(Stored::Before);
        }
        self.sink.verdict(delivery, verdict, component).await
    }

    async fn has_verdict(&self, message: &Message) -> bool {
        // A look-up is repeated until it succeeds; only storing can fail for good.
        let attempt = || self.sink.has_verdict(&message.id);
        Box::pin(self.persist(self.verdicts, "look for a verdict", attempt)).await.unwrap_or(false)
    }

    async fn has_letter(&self, letter: &str) -> bool {
        let attempt = || self.sink.has_letter(letter);
        Box::pin(self.persist(self.dead_letters, "look for a dead letter", attempt)).await.unwrap_or(false)
    }

    /// Whether the message is stored where it waits for its next delivery, so that this one can be acknowledged. One
    /// that is due soon, or cannot be stored there, waits at the consumer.
    async fn park(&self, delivery: &Delivery, wait: Duration) -> bool {
        let is_long = |parking: &Parking| (self.policy.park_after..=parking.wait_max).contains(&wait);
        let Some(parking) = self.parking.filter(is_long) else { return false };
        match self.sink.park(delivery, SystemTime::now() + wait, parking.by).await {
            Ok(_) => {
                self.stages.shared().parked.inc();
                self.parks.set(true);
                true
            }
            Err(err) => {
                let id = &delivery.message.id;
                if self.parks.replace(false) {
                    tracing::warn!(
                        id,
                        "cannot park a retry: {err}; it waits at the consumer, as others do until one can"
                    );
                }
                false
            }
        }
    }

    /// Repeats `attempt` as long as the stream is unavailable. Meanwhile the shard fetches nothing and is not ready:
    /// it is not the message's fault, and the next message would fare no better.
    async fn persist<T, F>(&self, store: &Store, what: &str, attempt: impl Fn() -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let mut wait = BACK_OFF.0;
        let mut failing = None;
        loop {
            match attempt().await {
                Err(StoreError::Unavailable(reason)) => {
                    self.stages.shared().store_failures.inc();
                    failing.get_or_insert_with(|| Failing::new(store, what, &reason));
                    sleep(wait).await;
                    wait = (wait * 2).min(BACK_OFF.1);
                }
                done => {
                    if failing.is_some_and(Failing::mended) {
                        let goes_on = if self.is_failing() { "" } else { "; fetching goes on" };
                        tracing::info!("{} can be stored again{goes_on}", store.what);
                    }
                    return done;
                }
            }
        }
    }

    /// The message's result is too large for the server: it stays in the stream, and an operator has to act.
    async fn unstorable(&self, delivery: &Delivery, what: &str, err: &StoreError) {
        let id = &delivery.message.id;
        tracing::error!(id, "the {what} is {err}; the message stays in its stream");
        self.acknowledge(delivery, AckKind::Nak(Some(self.policy.retry_max)), "retry", "too-large").await;
    }

    /// Gives a message back at once: it has not been begun.
    async fn hand_back(&self, delivery: &Delivery) {
        self.acknowledge(delivery, AckKind::Nak(None), "returned", "stop").await;
    }

    /// The last word on a message. If it does not reach the server, the message is delivered again.
    async fn acknowledge(&self, delivery: &Delivery, kind: AckKind, outcome: &'static str, reason: &'static str) {
        let started = Instant::now();
        if !self.identity.holds().await {
            self.gone.set(self.gone.get() + 1);
            return self.stages.settled("returned", "gone");
        }
        if let Err(err) = delivery.acknowledge(&self.client, kind).await {
            tracing::warn!(id = delivery.message.id, "acknowledge: {err}");
            return;
        }
        self.stages.observe(Stage::Ack, started.elapsed());
        self.stages.observe(Stage::EndToEnd, delivery.age + delivery.arrived.elapsed());
        self.stages.settled(outcome, reason);
    }

    /// Whether results of any kind cannot be stored now.
    fn is_failing(&self) -> bool {
        self.verdicts.failing.get() + self.dead_letters.failing.get() > 0
    }

    fn hold(&self, delivery: &Delivery) -> HoldGuard<'_> {
        let held = Held { reply: delivery.reply.clone(), touched: delivery.arrived };
        HoldGuard { held: &self.held, key: self.held.borrow_mut().insert(held) }
    }

    /// Tells the server of messages that take long, hands the metrics over, and lets go of a component that was replaced.
    async fn beat(&self, running: usize) {
        // Without a connection there is nobody to tell, and the client's buffer must not fill up with it.
        if self.is_connected() && self.identity.is_sure() {
            self.tell_of_long_ones().await;
        }
        self.stages.flush(running, self.slots_total - self.slots.available_permits(), self.lane.len());
        self.guest.get();
    }

    /// Whether there is a connection, as far as is known: a client that broke off had one.
    fn is_connected(&self) -> bool {
        self.client.connection_state() == async_nats::connection::State::Connected
    }

    async fn tell_of_long_ones(&self) {
        let due: Vec<async_nats::Subject> = self
            .held
            .borrow_mut()
            .iter_mut()
            .filter(|(_, held)| held.touched.elapsed() > self.half_ack_wait)
            .map(|(_, held)| {
                held.touched = Instant::now();
                held.reply.clone()
            })
            .collect();
        for reply in due {
            let _ = self.client.publish(reply, AckKind::Progress.into()).await;
        }
    }

    /// A number in 0..=1, another one each time.
    fn spread() -> f64 {
        RandomState::new().hash_one(()) as f64 / u64::MAX as f64
    }
}

/// Takes the message off the shard's list when it is settled.
struct HoldGuard<'a> {
    held: &'a RefCell<Slab<Held>>,
    key: usize,
}

impl Drop for HoldGuard<'_> {
    fn drop(&mut self) {
        self.held.borrow_mut().try_remove(self.key);
    }
}

/// Counts one message whose result cannot be stored, from the first failure to the end of trying.
struct Failing<'a>(&'a Store);

impl<'a> Failing<'a> {
    fn new(store: &'a Store, what: &str, reason: &str) -> Self {
        store.failing.set(store.failing.get() + 1);
        if store.works.set(false) {
            tracing::error!("cannot {what}: {reason}; trying again, and fetching nothing until it succeeds");
        }
        Self(store)
    }

    /// Whether it was the last, so that storing works again.
    fn mended(self) -> bool {
        self.0.failing.get() == 1 && self.0.works.set(true)
    }
}

impl Drop for Failing<'_> {
    fn drop(&mut self) {
        self.0.failing.set(self.0.failing.get() - 1);
        if self.0.failing.get() == 0 {
            self.0.works.set(true);
        }
    }
}
