//! How long a message takes from its sender to its verdict, at a steady rate.
//!
//! Messages are sent at times that are fixed beforehand, whatever becomes of those before; one that is sent late counts
//! from the time at which it should have been sent. Otherwise a stall would hide itself.

use crate::Report;
use crate::site::{HOST, NATIVE, Program, Running, Site, USUAL, Variant, mail};
use anyhow::{Context as _, Result, anyhow, bail, ensure};
use futures::StreamExt as _;
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};
use tests::bed::SOON;
use tests::report::{compared, median, table, turns};
use tests::{Host, Metrics, RawClient, eventually, streams};
use tokio::time::timeout;

const VARIANTS: [Variant; 3] = [NATIVE, HOST, USUAL];

/// Messages a second.
pub const RATES: [u32; 3] = [500, 2000, 10_000];

/// What a program does first: its first messages find nothing mapped.
const WARM_UP: (u32, Duration) = (2000, Duration::from_millis(250));

/// The stages of a message's way through the host, as its metrics call them.
const STAGES: [(&str, &str); 6] = [
    ("queue_wait", "wait for\na slot"),
    ("instantiate", "instan-\ntiate"),
    ("guest", "guest"),
    ("publish", "publish to\nPubAck"),
    ("ack", "ack"),
    ("end_to_end", "stream to\nack"),
];

/// Of the messages of one run, in microseconds.
#[derive(Clone, Debug, Serialize)]
struct Latency {
    p50_us: f64,
    p99_us: f64,
    p999_us: f64,
    /// Means by stage, of programs that have the host's metrics.
    stages_us: BTreeMap<&'static str, f64>,
}

/// Measures all of it.
pub async fn run(site: &mut Site) -> Result<Report> {
    let mail = mail(1024)?;
    let mut runs: BTreeMap<(u32, &str), Vec<Latency>> = BTreeMap::new();
    for round in 0..site.amount.rounds {
        for variant in turns(&VARIANTS, round) {
            site.empty(streams::MAIL).await?;
            site.empty(streams::VERDICTS).await?;
            let consumer = site.consumer().await?;
            let mut program = site.start(variant, &consumer).await?;
            measure(site, &mut program, &mail, WARM_UP).await?;
            for rate in RATES {
                let latency = measure(site, &mut program, &mail, (rate, site.amount.load)).await;
                let latency = latency.with_context(|| format!("{} at {rate} messages a second", variant.name))?;
                runs.entry((rate, variant.key)).or_default().push(latency);
            }
            program.stop().await?;
            site.forget(&consumer).await?;
        }
        eprintln!("    latency: {} of {} rounds", round + 1, site.amount.rounds);
    }
    Ok(Report { text: format!("{}\n{}", shown(&runs), stages(&runs)), json: as_json(&runs) })
}

/// Sends messages for a while; when this returns, the program's metrics have all of them.
async fn measure(site: &Site, program: &mut Running, mail: &[u8], (rate, load): (u32, Duration)) -> Result<Latency> {
    let before = match program {
        Running::Host(host) => Some(host.metrics().await?),
        Running::Usual(_) => None,
    };
    let mut times = latencies(site, mail, rate, load).await?;
    let stages_us = match (before, program) {
        (Some(before), Running::Host(host)) => means(&before, host, times.len()).await?,
        _ => BTreeMap::new(),
    };
    times.sort_unstable();
    let at = |share: f64| 1e6 * times[((times.len() - 1) as f64 * share).round() as usize].as_secs_f64();
    Ok(Latency { p50_us: at(0.5), p99_us: at(0.99), p999_us: at(0.999), stages_us })
}

/// What the host's metrics say of the last `count` messages, which they may not know of yet.
async fn means(before: &Metrics, host: &Host, count: usize) -> Result<BTreeMap<&'static str, f64>> {
    let since = |after: &Metrics, name: &str, what: &str| {
        let of = |metrics: &Metrics| metrics.get(&format!("mailroom_{name}_seconds_{what}"), &[]).unwrap_or_default();
        of(after) - of(before)
    };
    let enough = |after: &Metrics| since(after, "end_to_end", "count") >= count as f64;
    let after = eventually(SOON, "the metrics have all messages", async || host.metrics().await, enough).await?;
    Ok(STAGES.map(|(name, _)| (name, 1e6 * since(&after, name, "sum") / since(&after, name, "count"))).into())
}

/// Sends messages for a while, at a steady rate, and returns the time that each took to its verdict.
async fn latencies(site: &Site, mail: &[u8], rate: u32, load: Duration) -> Result<Vec<Duration>> {
    let count = (f64::from(rate) * load.as_secs_f64()) as u32;
    let stream = site.bed.jetstream.get_stream(streams::MAIL).await?;
    let first = stream.cached_info().state.last_sequence + 1;
    let due = move |begin: Instant, number: u32| begin + Duration::from_secs(1) * number / rate;
    let deadline = load + SOON;

    let (seen, arrivals) = mpsc::channel();
    let (subscribed, is_subscribed) = tokio::sync::oneshot::channel();
    let url = site.bed.server.url().to_owned();
    // Threads of their own, so that nobody waits for anything else this program does.
    let receiver = thread::spawn(on_this_thread({
        let url = url.clone();
        async move || receive(&url, count, deadline, subscribed, &seen).await
    }));
    if is_subscribed.await.is_err() {
        join(receiver).await?;
        bail!("the receiver ended at once");
    }
    let mail = mail.to_vec();
    let sender = thread::spawn(on_this_thread(async move || {
        let mut client = RawClient::connect(&url).await?;
        let begin = Instant::now() + Duration::from_millis(20);
        for number in 0..count {
            thread::sleep(due(begin, number).saturating_duration_since(Instant::now()));
            client.publish(b"mail.bench", None, &mail).await?;
        }
        client.flush().await?;
        Ok(begin)
    }));
    let begin = join(sender).await?;
    join(receiver).await?;

    let mut times = vec![None; count as usize];
    for (sequence, at) in arrivals {
        let number = sequence.checked_sub(first).and_then(|number| u32::try_from(number).ok());
        let number = number.filter(|number| *number < count).with_context(|| format!("verdict on {sequence}"))?;
        times[number as usize] = Some(at.saturating_duration_since(due(begin, number)));
    }
    times.into_iter().collect::<Option<_>>().context("a message got no verdict, another got two")
}

/// Passes on when verdicts come, with the sequence of the message: the last part of its id, which ends the subject.
async fn receive(
    url: &str,
    count: u32,
    deadline: Duration,
    subscribed: tokio::sync::oneshot::Sender<()>,
    seen: &mpsc::Sender<(u64, Instant)>,
) -> Result<()> {
    let client = async_nats::connect(url).await.context("connect to NATS")?;
    let mut verdicts = client.subscribe("verdict.>").await?;
    client.flush().await?;
    ensure!(subscribed.send(()).is_ok(), "nobody waits for verdicts");
    let all = async {
        for _ in 0..count {
            let verdict = verdicts.next().await.context("the server has gone")?;
            let now = Instant::now();
            let sequence = verdict.subject.rsplit(':').next().and_then(|sequence| sequence.parse().ok());
            seen.send((sequence.with_context(|| format!("{}: no id", verdict.subject))?, now))?;
        }
        anyhow::Ok(())
    };
    timeout(deadline, all).await.with_context(|| format!("not {count} verdicts within {deadline:?}"))?
}

/// Runs a future to its end on the thread that calls the result.
fn on_this_thread<T>(future: impl AsyncFnOnce() -> Result<T> + Send) -> impl FnOnce() -> Result<T> + Send {
    move || tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(future())
}

async fn join<T: Send + 'static>(thread: thread::JoinHandle<Result<T>>) -> Result<T> {
    let joined = tokio::task::spawn_blocking(|| thread.join()).await?;
    joined.map_err(|_| anyhow!("a thread panicked"))?
}

type Runs = BTreeMap<(u32, &'static str), Vec<Latency>>;

/// Medians of a figure over the runs.
fn of(runs: &Runs, rate: u32, variant: &Variant, figure: impl Fn(&Latency) -> f64) -> f64 {
    median(runs[&(rate, variant.key)].iter().map(figure))
}

fn shown(runs: &Runs) -> String {
    let heads = ["", "p50", "÷", "p99", "÷", "p99.9", "÷"];
    let figures: [fn(&Latency) -> f64; 3] = [|of| of.p50_us, |of| of.p99_us, |of| of.p999_us];
    let mut rows = Vec::new();
    for rate in RATES {
        for variant in &VARIANTS {
            let mut row = vec![format!("{rate}/s, {}", variant.name)];
            for figure in figures {
                row.extend(compared(of(runs, rate, variant, figure), of(runs, rate, &VARIANTS[0], figure), 1.0, "µs"));
            }
            rows.push(row);
        }
    }
    let rounds = runs.values().map(Vec::len).max().unwrap_or_default();
    format!("Latency from sending to the verdict, medians of {rounds}, in turns\n\n{}", table(&heads, &rows))
}

fn stages(runs: &Runs) -> String {
    let heads: Vec<&str> = [""].into_iter().chain(STAGES.map(|(_, head)| head)).collect();
    let mut rows = Vec::new();
    for rate in RATES {
        for variant in VARIANTS.iter().filter(|variant| variant.program != Program::Usual) {
            let mut row = vec![format!("{rate}/s, {}", variant.name)];
            row.extend(STAGES.map(|(stage, _)| {
                let mean = of(runs, rate, variant, |run| run.stages_us.get(stage).copied().unwrap_or(f64::NAN));
                format!("{mean:.1} µs")
            }));
            rows.push(row);
        }
    }
    format!("Of it in the host, means\n\n{}", table(&heads, &rows))
}

fn as_json(runs: &Runs) -> Value {
    let mut rates = serde_json::Map::new();
    for rate in RATES {
        let all = VARIANTS.iter().map(|variant| {
            let median = json!({
                "p50_us": of(runs, rate, variant, |run| run.p50_us),
                "p99_us": of(runs, rate, variant, |run| run.p99_us),
                "p999_us": of(runs, rate, variant, |run| run.p999_us),
            });
            let runs = &runs[&(rate, variant.key)];
            (variant.key.to_owned(), json!({ "name": variant.name, "median": median, "runs": runs }))
        });
        rates.insert(rate.to_string(), Value::Object(all.collect()));
    }
    Value::Object(rates)
}
