//! A cluster in small: KEDA and the autoscaler decide, real hosts come and go, mail comes as a curve says.

use crate::autoscaler::{Activation, Autoscaler, Settings};
use crate::bed::Bed;
use crate::books::Books;
use crate::scaler::{Client, Scaler};
use crate::streams::{self, MAIL};
use crate::{Host, http, tools};
use anyhow::{Context as _, Result, bail, ensure};
use async_nats::jetstream;
use external_scaler::{GetMetricsRequest, ScaledObjectRef};
use futures::StreamExt as _;
use futures::future::try_join_all;
use serde_json::Value;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

/// How often the state is noted, and the decisions are looked at.
const TICK: Duration = Duration::from_millis(100);

/// How long a host may take to drain.
const DRAIN: Duration = Duration::from_secs(60);

/// What every host runs with: a guest that waits 50 ms, eight at a time, settles some 150 messages a second.
const HOST: [&str; 6] = ["--shards", "1", "--slots", "8", "--max-in-flight", "64"];
const MAIL_TEXT: &str = "sleep 50";

/// Who says how much there is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// KEDA's own `nats-jetstream`, which reads the server's monitoring endpoint.
    BuiltIn,
    /// `host scaler`, as `external-push`.
    Push,
}

impl Trigger {
    /// The name of its type.
    pub fn name(self) -> &'static str {
        match self {
            Self::BuiltIn => "nats-jetstream",
            Self::Push => "external-push",
        }
    }
}

/// What comes, one after the other.
#[derive(Clone, Copy, Debug)]
pub enum Phase {
    /// Nothing, for so long.
    Quiet(Duration),
    /// So many mails as fast as they are stored.
    Burst(u32),
    /// So many a second, for so long.
    Steady(u32, Duration),
    /// Nothing until all is settled and no host is left.
    UntilZero,
}

/// How it was at a moment.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Since the beginning.
    pub at: Duration,
    /// Mails sent so far.
    pub sent: u64,
    /// Messages waiting or in flight.
    pub lag: u64,
    /// How many hosts there should be.
    pub replicas: u32,
}

/// What came of a simulation.
#[derive(Debug)]
pub struct Outcome {
    /// How it went.
    pub samples: Vec<Sample>,
    /// For every mail when it was stored, since the beginning, and how long its verdict took.
    pub latencies: Vec<(Duration, Duration)>,
    /// What became of every mail.
    pub books: Books,
}

/// The hosts, however they run.
pub trait Replicas {
    /// Sees to it that there are so many soon; waits for none that ends.
    fn scale(&mut self, wanted: u32) -> impl Future<Output = Result<()>>;

    /// Whether there is none, and none that is about to end.
    fn are_gone(&mut self) -> impl Future<Output = Result<bool>>;
}

/// Hosts that are processes of this machine.
#[derive(Debug)]
pub struct Processes {
    server: String,
    hosts: Vec<Host>,
    ending: JoinSet<Result<()>>,
}

impl Processes {
    /// None yet; they will work for this server.
    pub fn of(server: &str) -> Self {
        Self { server: server.to_owned(), hosts: Vec::new(), ending: JoinSet::new() }
    }
}

impl Replicas for Processes {
    async fn scale(&mut self, wanted: u32) -> Result<()> {
        let missing = (wanted as usize).saturating_sub(self.hosts.len());
        let component = tools::component("actor")?;
        let start = || Host::on(&self.server).component(&component).args(HOST).start();
        self.hosts.extend(try_join_all((0..missing).map(|_| start())).await?);
        for mut host in self.hosts.drain(wanted as usize..) {
            self.ending.spawn(async move {
                let status = host.stop(DRAIN).await?;
                ensure!(status.success(), "a host ended with {status}");
                host.process().quiet();
                Ok(())
            });
        }
        Ok(())
    }

    async fn are_gone(&mut self) -> Result<bool> {
        while let Some(ended) = self.ending.try_join_next() {
            ended.context("a host's end broke off")??;
        }
        Ok(self.hosts.is_empty() && self.ending.is_empty())
    }
}

/// Lets mail come to the server of `bed` in `phases`, and `hosts` with it. Mails that came before do not count.
///
/// # Errors
/// Anything that does not start, answers wrongly or takes too long; a mail that is lost or has two ends.
pub async fn simulate(
    bed: &Bed,
    hosts: impl Replicas,
    trigger: Trigger,
    settings: &Settings,
    phases: &[Phase],
    deadline: Duration,
) -> Result<Outcome> {
    let before = Books::of(&bed.jetstream).await?.mails;
    let mut scaler = match trigger {
        Trigger::BuiltIn => None,
        Trigger::Push => Some(Scaler::ready(bed.server.url()).await?),
    };
    let start = SystemTime::now();
    let mut cluster = Cluster::new(bed, hosts, settings, scaler.as_ref()).await?;
    tokio::time::timeout(deadline, cluster.run(phases))
        .await
        .with_context(|| format!("the simulation did not end within {deadline:?}"))??;
    let samples = std::mem::take(&mut cluster.samples);
    drop(cluster);
    let books = bed.books_balance(before + samples.last().map_or(0, |last| last.sent)).await?;
    let latencies = latencies(bed, start).await?;
    if let Some(scaler) = &mut scaler {
        scaler.process().quiet();
    }
    Ok(Outcome { samples, latencies, books })
}

struct Cluster<'a, R> {
    bed: &'a Bed,
    hosts: R,
    settings: &'a Settings,
    client: Option<Client>,
    object: ScaledObjectRef,
    /// What the scaler pushes, of its own accord.
    pushed: mpsc::UnboundedReceiver<bool>,
    pushing: JoinSet<Result<()>>,
    activation: Activation,
    autoscaler: Autoscaler,
    start: Instant,
    replicas: u32,
    samples: Vec<Sample>,
    sent: Arc<AtomicU64>,
}

impl<'a, R: Replicas> Cluster<'a, R> {
    async fn new(bed: &'a Bed, hosts: R, settings: &'a Settings, scaler: Option<&Scaler>) -> Result<Self> {
        let metadata = [
            ("scalerAddress", scaler.map_or_else(String::new, |scaler| scaler.address().to_owned())),
            ("stream", MAIL.to_owned()),
            ("consumer", "triage".to_owned()),
            ("lagThreshold", settings.lag_threshold.to_string()),
        ];
        let scaler_metadata: HashMap<_, _> = metadata.map(|(key, value)| (key.to_owned(), value)).into();
        let object = ScaledObjectRef { name: "triage".into(), namespace: "mail".into(), scaler_metadata };
        let (news, pushed) = mpsc::unbounded_channel();
        let mut pushing = JoinSet::new();
        let client = match scaler {
            None => None,
            Some(scaler) => {
                let (mut streaming, object) = (scaler.client().await?, object.clone());
                pushing.spawn(async move {
                    let mut stream = streaming.stream_is_active(object).await?.into_inner();
                    while let Some(active) = stream.next().await {
                        let _ = news.send(active?.result);
                    }
                    bail!("the scaler's stream has ended")
                });
                Some(scaler.client().await?)
            }
        };
        Ok(Self {
            bed,
            hosts,
            settings,
            client,
            object,
            pushed,
            pushing,
            activation: Activation::default(),
            autoscaler: Autoscaler::default(),
            start: Instant::now(),
            replicas: 0,
            samples: Vec::new(),
            sent: Arc::default(),
        })
    }

    async fn run(&mut self, phases: &[Phase]) -> Result<()> {
        // After how many mails nothing was left to do, and no host.
        let (at_zero, zero) = watch::channel(0);
        let jetstream = self.bed.server.jetstream().await?;
        let mut publisher = JoinSet::new();
        publisher.spawn(publish(jetstream, phases.to_vec(), self.sent.clone(), zero));
        let every = |period| {
            let mut timer = interval(period);
            timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
            timer
        };
        let (mut tick, mut poll, mut sync) =
            (every(TICK), every(self.settings.polling_interval), every(self.settings.sync_period));
        let mut is_published = false;
        loop {
            tokio::select! {
                biased;
                Some(active) = self.pushed.recv() => self.activate(active).await?,
                Some(ended) = publisher.join_next() => {
                    ended.context("the publisher broke off")??;
                    is_published = true;
                }
                Some(ended) = self.pushing.join_next() => ended.context("the listener broke off")??,
                _ = poll.tick() => {
                    let active = self.is_active().await?;
                    self.activate(active).await?;
                }
                _ = sync.tick(), if self.replicas > 0 => {
                    let (value, target) = (self.metric().await?, self.settings.lag_threshold as f64);
                    let now = self.start.elapsed();
                    let wanted = self.autoscaler.decide(now, self.replicas, value, target, self.settings);
                    self.scale(wanted).await?;
                }
                _ = tick.tick() => {
                    let (sent, lag) = (self.sent.load(Ordering::Relaxed), self.lag().await?);
                    self.samples.push(Sample { at: self.start.elapsed(), sent, lag, replicas: self.replicas });
                    if lag == 0 && self.replicas == 0 && self.hosts.are_gone().await? {
                        at_zero.send_replace(sent);
                        if is_published {
                            return Ok(());
                        }
                    }
                }
            }
        }
    }

    async fn activate(&mut self, active: bool) -> Result<()> {
        let wanted = self.activation.decide(self.start.elapsed(), self.replicas, active, self.settings);
        self.scale(wanted).await
    }

    async fn scale(&mut self, wanted: u32) -> Result<()> {
        if wanted == 0 {
            self.autoscaler.reset();
        }
        if wanted != self.replicas {
            self.replicas = wanted;
            self.hosts.scale(wanted).await?;
        }
        Ok(())
    }

    async fn is_active(&mut self) -> Result<bool> {
        match &mut self.client {
            None => Ok(self.lag_by_monitoring().await? > 0),
            Some(client) => Ok(client.is_active(self.object.clone()).await?.into_inner().result),
        }
    }

    async fn metric(&mut self) -> Result<f64> {
        let Some(client) = &mut self.client else { return Ok(self.lag_by_monitoring().await? as f64) };
        let spec = client.get_metric_spec(self.object.clone()).await?.into_inner();
        let metric_name = spec.metric_specs.first().context("no metric")?.metric_name.clone();
        let request = GetMetricsRequest { scaled_object_ref: Some(self.object.clone()), metric_name };
        let values = client.get_metrics(request).await?.into_inner().metric_values;
        let value = values.first().context("no value")?;
        Ok(if value.metric_value_float > 0.0 { value.metric_value_float } else { value.metric_value as f64 })
    }

    /// As KEDA's own trigger does it.
    async fn lag_by_monitoring(&self) -> Result<u64> {
        let url = format!("{}/jsz?acc=$G&consumers=true&config=true", self.bed.server.monitoring());
        let answer: Value = serde_json::from_str(&http::get(&url).await?.body).context("what /jsz says")?;
        let streams = answer["account_details"][0]["stream_detail"].as_array().context("no streams")?;
        let mail = streams.iter().find(|stream| stream["name"] == MAIL).context("no stream MAIL")?;
        let consumers = mail["consumer_detail"].as_array().context("no consumers")?;
        let triage = consumers.iter().find(|consumer| consumer["name"] == "triage").context("no consumer triage")?;
        let count = |name: &str| triage[name].as_u64().unwrap_or_default();
        Ok(count("num_pending") + count("num_ack_pending"))
    }

    async fn lag(&self) -> Result<u64> {
        let info = self.bed.consumer().await?.cached_info().clone();
        Ok(info.num_pending + info.num_ack_pending as u64)
    }
}

/// How many mails are on their way at a time in a burst.
const BATCH: u32 = 500;

async fn publish(
    jetstream: jetstream::Context,
    phases: Vec<Phase>,
    sent: Arc<AtomicU64>,
    mut at_zero: watch::Receiver<u64>,
) -> Result<()> {
    let send = async |count: u32| -> Result<()> {
        let mails = (0..count).map(|_| jetstream.publish("mail.simulated", MAIL_TEXT.into()));
        for stored in try_join_all(mails).await? {
            stored.await?;
        }
        sent.fetch_add(count.into(), Ordering::Relaxed);
        Ok(())
    };
    for phase in phases {
        match phase {
            Phase::Quiet(duration) => sleep(duration).await,
            Phase::Burst(mut left) => {
                while left > 0 {
                    let now = left.min(BATCH);
                    send(now).await?;
                    left -= now;
                }
            }
            Phase::Steady(rate, duration) => {
                let start = Instant::now();
                let mut so_far = 0;
                while start.elapsed() < duration {
                    let due = (start.elapsed().as_secs_f64() * f64::from(rate)) as u32;
                    send(due - so_far).await?;
                    so_far = due;
                    sleep(TICK / 2).await;
                }
            }
            Phase::UntilZero => {
                let all = sent.load(Ordering::Relaxed);
                at_zero.wait_for(|mails| *mails == all).await?;
            }
        }
    }
    Ok(())
}

/// By the server's clock, of every mail that has a verdict, in the order in which they were stored.
async fn latencies(bed: &Bed, start: SystemTime) -> Result<Vec<(Duration, Duration)>> {
    let mails = streams::messages(&bed.jetstream, MAIL).await?;
    let stored: HashMap<u64, SystemTime> = mails.iter().map(|mail| (mail.sequence, mail.time)).collect();
    let mut latencies = Vec::new();
    for verdict in streams::verdicts(&bed.jetstream).await? {
        let at = stored.get(&verdict.mail_sequence()?).context("a verdict on no mail")?;
        if let Ok(since) = at.duration_since(start) {
            latencies.push((since, verdict.time.duration_since(*at)?));
        }
    }
    latencies.sort_unstable();
    Ok(latencies)
}
