//! What hostile messages cost their neighbours in time. A binary of its own: it measures, so no other test may run
//! beside it.

use async_nats::jetstream::Context;
use std::collections::HashMap;
use tests::prelude::*;
use tokio::time::{MissedTickBehavior, interval};

/// Messages that are published in one half of a round, and how many of them every millisecond.
const NEIGHBOURS: usize = 2000;
const PER_MILLISECOND: usize = 2;

/// What hostile neighbours do, each of it every tenth of a second.
const HOSTILE: [&str; 4] = ["loop", "hoard", "recurse", "call"];
const HOSTILE_EVERY: usize = 200;

/// The host gives up a hostile message at its first delivery, and none of them outlives its round.
const ARGS: [&str; 4] = ["--attempts", "1", "--deadline", "200ms"];

/// Rounds of which the medians are taken; as many again, twice, while these are out of bounds.
const ROUNDS: usize = 5;
const TRIES: usize = 3;

/// What the host promises for the 99th percentile: a fifth more, and one tick of the epoch.
const FACTOR: f64 = 1.2;
const TICK: Duration = Duration::from_millis(1);

const SOON: Duration = Duration::from_secs(30);

/// Endless loops, memory bombs and recursions next to ordinary messages leave these their latency.
///
/// Each round measures calm and hostile one right after the other, so that whatever else the machine does is in both.
/// What else it does can also spoil most rounds of a try; a host that lets neighbours suffer fails every try.
#[tokio::test]
async fn hostile_messages_leave_their_neighbours_their_latency() -> Result<()> {
    let server = NatsServer::start().await?;
    command::host(["provision", "--server", server.url()]).await?.success()?;
    let jetstream = server.jetstream().await?;
    let host = Host::on(server.url()).component(tools::component("actor")?).args(ARGS).start().await?;
    host.until_ready(SOON).await?;
    half_round(&jetstream, false).await?;
    for attempt in 1..=TRIES {
        let (mut calm, mut hostile) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            calm.push(half_round(&jetstream, false).await?);
            hostile.push(half_round(&jetstream, true).await?);
        }
        println!("try {attempt}: 99th percentiles, calm {calm:.1?}, hostile {hostile:.1?}");
        let (calm, hostile) = (median(calm), median(hostile));
        println!("medians: calm {calm:.2?}, hostile {hostile:.2?}");
        if hostile <= calm.mul_f64(FACTOR) + TICK {
            return Ok(());
        }
    }
    bail!("hostile messages cost their neighbours more than {FACTOR} times the latency and {TICK:?}")
}

/// Publishes neighbours at a steady pace, with or without hostile messages between them, and returns the 99th
/// percentile of the time from a neighbour's arrival in its stream to that of its verdict.
async fn half_round(jetstream: &Context, is_hostile: bool) -> Result<Duration> {
    let mut tick = interval(Duration::from_millis(1));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut stored, mut hostile) = (Vec::new(), 0);
    for number in 0..NEIGHBOURS {
        if number % PER_MILLISECOND == 0 {
            tick.tick().await;
        }
        stored.push(jetstream.publish("mail.test", "verdict neighbour".into()).await?);
        if is_hostile && let Some(command) = HOSTILE.get(number % HOSTILE_EVERY) {
            stored.push(jetstream.publish("mail.test", (*command).into()).await?);
            hostile += 1;
        }
    }
    for stored in stored {
        stored.await?;
    }
    let look = async || {
        let verdicts = streams::count(jetstream, streams::VERDICTS).await?;
        Ok((verdicts as usize, streams::count(jetstream, streams::DEAD).await?))
    };
    eventually(SOON, "everything settled", look, |settled| *settled == (NEIGHBOURS, hostile)).await?;
    let mails = streams::messages(jetstream, streams::MAIL).await?;
    let arrivals: HashMap<_, _> = mails.iter().map(|mail| (mail.sequence, mail.time)).collect();
    let mut latencies = Vec::new();
    for verdict in streams::verdicts(jetstream).await? {
        let arrival = arrivals.get(&verdict.mail_sequence()?).context("a verdict on no mail")?;
        latencies.push(verdict.time.duration_since(*arrival)?);
    }
    for stream in [streams::MAIL, streams::VERDICTS, streams::DEAD] {
        jetstream.get_stream(stream).await?.purge().await?;
    }
    latencies.sort_unstable();
    Ok(latencies[latencies.len() * 99 / 100])
}

fn median(mut values: Vec<Duration>) -> Duration {
    values.sort_unstable();
    values[values.len() / 2]
}
