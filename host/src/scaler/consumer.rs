//! One consumer as KEDA sees it: how much there is to do, whether that is anything at all, and who says so first.

use super::rate::{Rate, Sample};
use super::{Observed, Server};
use crate::nats::innermost;
use async_nats::jetstream::consumer::pull::Config;
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy};
use async_nats::jetstream::context::RequestErrorKind;
use async_nats::jetstream::response::Response;
use async_nats::jetstream::{Context, ErrorCode};
use async_nats::{Client, StatusCode, Subscriber};
use futures::StreamExt as _;
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};
use tokio::select;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

/// How often an active consumer is looked at.
const LOOK_ACTIVE: Duration = Duration::from_secs(2);

/// How often an inactive one is looked at where no watcher can be made.
const LOOK_UNWATCHED: Duration = Duration::from_secs(1);

/// The shortest and the longest pause after a message that called for nothing, since a host was faster or since there
/// are not enough yet: a trickle of messages is not a reason to ask the server after each.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// The first and the longest wait before something that failed is repeated.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// How long a watcher's pull waits at the server. An inactive consumer is looked at as often, watcher or not.
const PULL_EXPIRES: Duration = Duration::from_secs(30);

/// How often the server says that the pull still stands, and the silence after which the watcher is taken for lost.
const IDLE_HEARTBEAT: Duration = Duration::from_secs(1);
const SILENCE_MAX: Duration = Duration::from_millis(2500);

/// When the server removes a watcher that nobody pulls from, as after a crash.
const INACTIVE_THRESHOLD: Duration = Duration::from_secs(10);

/// A consumer that replicas are scaled for, with the lag above which there is something to do.
pub struct Watched {
    stream: String,
    consumer: String,
    activation: u64,
    server: Arc<Server>,
    state: Mutex<State>,
    news: watch::Sender<News>,
    /// Stops the task that waits for messages when the last of those goes who want to be told.
    watch: Mutex<Weak<DropGuard>>,
}

/// What is remembered between looks.
struct State {
    rate: Rate,
    /// When the consumer was made: another one of its name begins to count anew.
    made: String,
    used: Instant,
}

/// What those are told who wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// Nothing is known yet, or the server is away: what was told last may still be so.
    Nothing,
    /// Whether there is something to do.
    Active(bool),
    /// There is no such consumer.
    Missing(String),
}

/// What a look at the consumer found.
#[derive(Debug, Clone, Copy)]
pub struct Look {
    /// Messages waiting or in flight.
    pub lag: u64,
    /// Whether there is something to do.
    pub is_active: bool,
    /// Messages that one place of a host settles in a second, see [`Rate`].
    pub speed: Option<f64>,
}

/// Why there is nothing to say about a consumer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Trouble {
    /// It does not exist.
    #[error("{0}")]
    Missing(String),
    /// The server does not answer, or not to this question.
    #[error("{0}")]
    Away(String),
}

/// What is read of a consumer's information.
#[derive(Deserialize)]
struct Info {
    created: String,
    config: Filters,
    delivered: Delivered,
    num_pending: u64,
    num_ack_pending: u64,
}

#[derive(Deserialize)]
struct Filters {
    #[serde(default)]
    filter_subject: String,
    #[serde(default)]
    filter_subjects: Vec<String>,
}

#[derive(Deserialize)]
struct Delivered {
    consumer_seq: u64,
}

impl Watched {
    /// Knows nothing yet and asks nothing.
    pub fn new(server: Arc<Server>, stream: String, consumer: String, activation: u64) -> Self {
        Self {
            stream,
            consumer,
            activation,
            server,
            state: Mutex::new(State { rate: Rate::default(), made: String::new(), used: Instant::now() }),
            news: watch::Sender::new(News::Nothing),
            watch: Mutex::default(),
        }
    }

    /// How long ago anybody asked.
    pub fn idle(&self) -> Duration {
        self.state().used.elapsed()
    }

    /// Asks the server now.
    ///
    /// It is active when more messages wait or are in flight than the activation lag, and remains so until there are
    /// none at all.
    ///
    /// # Errors
    /// There is no such consumer, or no answer within the server's timeout.
    pub async fn look(&self) -> Result<Look, Trouble> {
        self.look_closely().await.map(|(look, _)| look)
    }

    async fn look_closely(&self) -> Result<(Look, Filters), Trouble> {
        match self.info().await {
            Ok(info) => Ok((self.observe(&info), info.config)),
            Err(trouble) => {
                self.tell(match &trouble {
                    Trouble::Missing(reason) => News::Missing(reason.clone()),
                    Trouble::Away(_) => return Err(trouble),
                });
                Err(trouble)
            }
        }
    }

    /// What is told from now on. While anybody holds the guard, activation is noticed as soon as a message arrives.
    pub fn listen(self: &Arc<Self>) -> (watch::Receiver<News>, Arc<DropGuard>) {
        let mut watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        let guard = watch.upgrade().unwrap_or_else(|| {
            let stop = self.server.stop.child_token();
            self.server.tasks.spawn(Arc::clone(self).run(stop.clone()));
            let guard = Arc::new(stop.drop_guard());
            *watch = Arc::downgrade(&guard);
            guard
        });
        (self.news.subscribe(), guard)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, news: News) {
        self.news.send_if_modified(|last| {
            let is_new = *last != news;
            if is_new && news == News::Active(true) {
                self.server.metrics.activations.inc();
                tracing::debug!(stream = self.stream, consumer = self.consumer, "there is something to do");
            }
            *last = news;
            is_new
        });
    }

    fn observe(&self, info: &Info) -> Look {
        let sample = Sample {
            at: self.server.since_start(),
            waiting: info.num_pending,
            in_flight: info.num_ack_pending,
            delivered: info.delivered.consumer_seq,
        };
        let mut state = self.state();
        if state.made != info.created {
            state.made.clone_from(&info.created);
            state.rate = Rate::default();
        }
        state.used = Instant::now();
        state.rate.observe(sample);
        let lag = sample.lag();
        let was_active = *self.news.borrow() == News::Active(true);
        let is_active = lag > if was_active { 0 } else { self.activation };
        let look = Look { lag, is_active, speed: state.rate.speed() };
        // Still holding the lock, so that an older look cannot be told after this one.
        self.tell(News::Active(is_active));
        look
    }

    async fn info(&self) -> Result<Info, Trouble> {
        let (stream, consumer) = (&self.stream, &self.consumer);
        let jetstream = self.server.jetstream().ok_or_else(|| Trouble::Away("no connection to NATS".to_owned()))?;
        match jetstream.request(format!("CONSUMER.INFO.{stream}.{consumer}"), &json!({})).await {
            Ok(Response::Ok(info)) => Ok(info),
            Ok(Response::Err { error }) => Err(match error.error_code() {
                ErrorCode::CONSUMER_NOT_FOUND => {
                    Trouble::Missing(format!("no consumer {consumer} of stream {stream}; `host provision` makes it"))
                }
                ErrorCode::STREAM_NOT_FOUND => {
                    Trouble::Missing(format!("no stream {stream}; `host provision` makes it"))
                }
                _ => Trouble::Away(format!("look up consumer {consumer} of stream {stream}: {error}")),
            }),
            Err(err) => Err(Trouble::Away(match err.kind() {
                RequestErrorKind::NoResponders => {
                    "JetStream does not answer; start the server with `nats-server -js`, or look at --js-domain and \
                     --js-api-prefix"
                        .to_owned()
                }
                RequestErrorKind::TimedOut => format!(
                    "look up consumer {consumer} of stream {stream}: no answer; if the server runs, this user may lack \
                     permission to publish to `$JS.API.CONSUMER.INFO.{stream}.{consumer}` or to subscribe to its inbox \
                     (see --inbox-prefix)"
                ),
                _ => format!("look up consumer {consumer} of stream {stream}: {}", innermost(&err)),
            })),
        }
    }

    /// Looks now and then while there is something to do, and waits for a message while there is not.
    async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut wait = BACK_OFF.0;
        let mut complaint = String::new();
        loop {
            let pause = match self.look_closely().await {
                Ok((look, filters)) => {
                    wait = BACK_OFF.0;
                    match look.is_active {
                        true => LOOK_ACTIVE,
                        false => self.wait(filters, &mut complaint, &stop).await,
                    }
                }
                Err(trouble) => {
                    tracing::debug!("{trouble}; trying again in {wait:?}");
                    let pause = wait;
                    wait = (wait * 2).min(BACK_OFF.1);
                    pause
                }
            };
            select! {
                () = sleep(pause) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Makes a watcher and waits by it; gives the time after which to look again. Tells of every new reason why there
    /// is none, once.
    async fn wait(&self, filters: Filters, complaint: &mut String, stop: &CancellationToken) -> Duration {
        match Watcher::make(&self.server, &self.stream, &self.consumer, filters).await {
            Ok(watcher) => {
                complaint.clear();
                self.wait_for_messages(watcher, stop).await;
                // Not sooner, so that a host that is quick with a trickle of messages makes no news of each.
                if *self.news.borrow() == News::Active(true) { LOOK_ACTIVE } else { Duration::ZERO }
            }
            Err(reason) => {
                if reason != *complaint {
                    self.server.metrics.watcher_failures.inc();
                    tracing::warn!(
                        stream = self.stream,
                        consumer = self.consumer,
                        "no watcher: {reason}; asking every {LOOK_UNWATCHED:?} instead"
                    );
                    *complaint = reason;
                }
                LOOK_UNWATCHED
            }
        }
    }

    /// Until there is something to do, or the watcher is lost. Ends with the watcher removed.
    async fn wait_for_messages(&self, mut watcher: Watcher, stop: &CancellationToken) {
        let mut pause = PAUSE.0;
        // What came before the watcher was there is found by this look, what comes later by the watcher.
        while let Ok(Look { is_active: false, .. }) = self.look().await {
            let event = select! {
                event = watcher.next() => event,
                () = stop.cancelled() => break,
            };
            match event {
                Event::Message => {}
                Event::Nothing => {
                    pause = PAUSE.0;
                    continue;
                }
                Event::Lost(reason) => {
                    tracing::debug!(stream = self.stream, consumer = self.consumer, "watcher lost: {reason}");
                    break;
                }
            }
            if !matches!(self.look().await, Ok(Look { is_active: false, .. })) {
                break;
            }
            select! {
                () = sleep(pause) => pause = (pause * 2).min(PAUSE.1),
                () = stop.cancelled() => break,
            }
        }
        watcher.remove().await;
    }
}

/// A short-lived consumer beside the watched one: says that a message has come, and takes none away from it.
struct Watcher {
    client: Client,
    jetstream: Context,
    stream: String,
    name: String,
    inbox: String,
    answers: Subscriber,
    next_subject: String,
    /// Whether a pull waits at the server.
    is_waiting: bool,
    _count: Observed,
}

/// What a watcher has to say.
enum Event {
    Message,
    /// None came for a while.
    Nothing,
    /// It has to be made again.
    Lost(String),
}

impl Watcher {
    /// Makes the consumer: of what comes from now on, by the same filters, headers only, nothing to acknowledge.
    async fn make(server: &Server, stream: &str, consumer: &str, filters: Filters) -> Result<Self, String> {
        let jetstream = server.jetstream().ok_or("no connection to NATS")?;
        let config = Config {
            description: Some(format!("wakes the hosts of {consumer}")),
            deliver_policy: DeliverPolicy::New,
            ack_policy: AckPolicy::None,
            filter_subject: filters.filter_subject,
            filter_subjects: filters.filter_subjects,
            headers_only: true,
            inactive_threshold: INACTIVE_THRESHOLD,
            num_replicas: 1,
            memory_storage: true,
            ..Config::default()
        };
        // By the subject that takes no name: whoever may publish there can change no consumer that exists.
        let request = json!({ "stream_name": stream, "config": config });
        let made: Response<Value> =
            jetstream.request(format!("CONSUMER.CREATE.{stream}"), &request).await.map_err(|err| match err.kind() {
                RequestErrorKind::TimedOut => {
                    format!("no answer; this user may lack permission to publish to `$JS.API.CONSUMER.CREATE.{stream}`")
                }
                _ => innermost(&err),
            })?;
        let name = match made {
            Response::Ok(info) => info["name"].as_str().ok_or("the server gave it no name")?.to_owned(),
            Response::Err { error } => return Err(error.to_string()),
        };
        let client = jetstream.client().clone();
        let inbox = client.new_inbox();
        let answers = client.subscribe(inbox.clone()).await.map_err(|err| innermost(&err))?;
        let next_subject = format!("{}.CONSUMER.MSG.NEXT.{stream}.{name}", server.api_prefix());
        let count = Observed::new(&server.metrics.watchers);
        Ok(Self {
            client,
            jetstream,
            stream: stream.to_owned(),
            name,
            inbox,
            answers,
            next_subject,
            is_waiting: false,
            _count: count,
        })
    }

    /// Waits for a message, with one pull for one message.
    ///
    /// # Cancel safety
    /// A pull that waits is kept for the next call.
    async fn next(&mut self) -> Event {
        if !self.is_waiting {
            let (expires, heartbeat) = (PULL_EXPIRES.as_nanos(), IDLE_HEARTBEAT.as_nanos());
            let pull = format!(r#"{{"batch":1,"expires":{expires},"idle_heartbeat":{heartbeat}}}"#);
            let (subject, inbox) = (self.next_subject.clone(), self.inbox.clone());
            if let Err(err) = self.client.publish_with_reply(subject, inbox, pull.into()).await {
                return Event::Lost(innermost(&err));
            }
            self.is_waiting = true;
        }
        loop {
            let message = match timeout(SILENCE_MAX, self.answers.next()).await {
                Ok(Some(message)) => message,
                Ok(None) => return Event::Lost("the connection is closed".to_owned()),
                Err(_) => return Event::Lost(format!("no sign of it for {SILENCE_MAX:?}")),
            };
            let event = match message.status {
                None | Some(StatusCode::OK) => Event::Message,
                Some(StatusCode::IDLE_HEARTBEAT) => continue,
                Some(StatusCode::TIMEOUT | StatusCode::NOT_FOUND) => Event::Nothing,
                Some(status) => Event::Lost(format!("{} ({status})", message.description.unwrap_or_default())),
            };
            self.is_waiting = false;
            return event;
        }
    }

    /// Removes the consumer. Where that fails the server does it, after [`INACTIVE_THRESHOLD`].
    async fn remove(self) {
        let subject = format!("CONSUMER.DELETE.{}.{}", self.stream, self.name);
        let removed: Result<Response<Value>, _> = self.jetstream.request(subject, &json!({})).await;
        if let Err(err) = removed {
            tracing::debug!("remove watcher {} of stream {}: {}", self.name, self.stream, innermost(&err));
        }
    }
}
