//! How long it takes from the start of a process to its first message settled.

use crate::Report;
use crate::site::{HOST, LEAN, NATIVE, Program, Site, Variant, variant};
use anyhow::{Context as _, Result, bail, ensure};
use futures::{FutureExt as _, StreamExt as _};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tests::bed::SOON;
use tests::prelude::Signal;
use tests::report::{compared, median, table, turns};
use tests::{streams, tools};
use tokio::time::timeout;

/// The one with a compiler.
const EVERYDAY: Variant = variant("", "", Program::EverydayHost(LEAN));

/// All others are compared with the first.
const VARIANTS: [Start; 6] = [
    Start { of: NATIVE, component: Component::Ready },
    Start { of: Variant { name: "host run, .cwasm", ..HOST }, component: Component::Ready },
    Start {
        of: variant("native-everyday", "native-handler, everyday build", Program::EverydayNative),
        component: Component::Ready,
    },
    Start {
        of: Variant { key: "host-everyday", name: "host run, everyday build, .cwasm", ..EVERYDAY },
        component: Component::Ready,
    },
    Start {
        of: Variant { key: "host-cached", name: "host run, everyday build, .wasm, cached", ..EVERYDAY },
        component: Component::Cached,
    },
    Start {
        of: Variant {
            key: "host-compiling",
            name: "host run, everyday build, .wasm, --no-cache",
            args: &["--no-cache"],
            ..EVERYDAY
        },
        component: Component::ToBeCompiled,
    },
];

struct Start {
    of: Variant,
    component: Component,
}

/// What the program finds.
#[derive(PartialEq)]
enum Component {
    Ready,
    Cached,
    ToBeCompiled,
}

/// Starts for each round of what takes seconds.
const STARTS_PER_ROUND: usize = 10;

/// Measures all of it.
pub async fn run(site: &mut Site) -> Result<Report> {
    let rounds = STARTS_PER_ROUND * site.amount.rounds;
    site.empty(streams::MAIL).await?;
    let consumer = site.consumer().await?;
    let mut times: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for round in 0..=rounds {
        for start in turns(&VARIANTS, round) {
            let time = settled(site, start, &consumer).await.with_context(|| format!("start: {}", start.of.name))?;
            // The first round finds cold caches, and nothing compiled.
            if round > 0 {
                times.entry(start.of.key).or_default().push(time.as_secs_f64());
            }
        }
    }
    eprintln!("    cold start: {rounds} rounds");
    site.forget(&consumer).await?;

    let heads = ["", "exec to first\nmessage settled", "÷", "fastest"];
    let first = median(times[VARIANTS[0].of.key].iter().copied());
    let mut json = serde_json::Map::new();
    let mut rows = Vec::new();
    for Start { of, .. } in &VARIANTS {
        let times = &times[of.key];
        let middle = median(times.iter().copied());
        let mut row = vec![of.name.to_owned()];
        row.extend(compared(middle, first, 1e3, "ms"));
        row.push(format!("{:.1} ms", 1e3 * times.iter().copied().fold(f64::INFINITY, f64::min)));
        rows.push(row);
        json.insert(of.key.to_owned(), json!({ "name": of.name, "median_s": middle, "runs_s": times }));
    }
    let text = format!("Cold start, medians of {rounds}, in turns\n\n{}", table(&heads, &rows));
    Ok(Report { text, json: Value::Object(json) })
}

/// Starts a program for which a message waits, and ends it.
async fn settled(site: &Site, start: &Start, consumer: &str) -> Result<Duration> {
    let client = site.bed.server.client().await?;
    let mut acknowledgements = client.subscribe(format!("$JS.ACK.MAIL.{consumer}.>")).await?;
    client.flush().await?;
    let mail = crate::site::mail(1024)?;
    site.bed.jetstream.publish("mail.bench", mail.into()).await?.await?;
    ensure!(acknowledgements.next().now_or_never().is_none(), "somebody else settles messages");

    let mut builder = site.builder(&start.of, consumer)?;
    if start.component != Component::Ready {
        builder = builder.component(tools::component(LEAN)?);
    }
    let began = Instant::now();
    let mut process = builder.spawn()?;
    let acknowledged = tokio::select! {
        acknowledged = timeout(SOON, acknowledgements.next()) => acknowledged.context("no message was settled")?,
        last_line = process.wait_for_end() => bail!("it ended at once; {last_line}"),
    };
    let took = began.elapsed();
    let payload = acknowledged.context("the server has gone")?.payload;
    ensure!(payload == "+ACK", "the message got no verdict: {payload:?}");
    process.signal(Signal::TERM)?;
    process.wait(SOON).await?;
    process.quiet();
    Ok(took)
}
