//! More than a host can do at once: bursts, long guests, streams that are full.

use async_nats::jetstream::stream::DiscardPolicy;
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde_json::Value;
use std::iter::repeat_n;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tests::bed::{Bed, SOON};
use tests::prelude::*;

/// A burst of slow messages waits in the stream: the host holds no more than it may, in no more memory, and gets
/// through it.
#[tokio::test]
async fn a_burst_waits_in_the_stream() -> Result<()> {
    const BURST: u64 = 4000;
    let bed = Bed::new().await?;
    let limits = ["--shards", "2", "--slots", "8", "--max-in-flight", "32"];
    let mut host = bed.actor(&limits).await?;
    bed.tell(repeat_n("verdict warm", 200)).await?;
    bed.verdicts(200).await?;
    let before = resident_kib(&mut host)?;
    bed.tell(repeat_n("sleep 5", BURST as usize)).await?;
    let (mut most_held, mut most_kib) = (0, 0);
    let mut consumer = bed.consumer().await?;
    let look = async || {
        let info = consumer.info().await?;
        let held = host.metrics().await?.get("mailroom_in_flight", &[]).context("in flight")?;
        most_held = most_held.max(held as u64);
        most_kib = most_kib.max(resident_kib(&mut host)?);
        Ok(info.num_pending as usize + info.num_ack_pending)
    };
    eventually(SOON, "the burst is done", look, |left| *left == 0).await?;
    assert!((1..=64).contains(&most_held), "{most_held} messages held by 2 shards of 32");
    assert!(most_kib < before + 16 * 1024, "resident memory went from {before} KiB to {most_kib} KiB");
    bed.one_verdict_each(200 + BURST).await
}

/// Guests that compute for long fill the slow lane, a quarter of the slots, and no more: short ones pass them all.
/// Those that found no place begin again there, and each gets its verdict.
#[tokio::test]
async fn long_guests_leave_the_slots_to_short_ones() -> Result<()> {
    let bed = Bed::new().await?;
    bed.tell(repeat_n("spin 100", 12).chain(repeat_n("verdict quick", 200))).await?;
    let host = bed.actor(&["--shards", "1", "--slots", "4", "--deadline", "20s"]).await?;
    let verdicts = bed.verdicts(212).await?;
    let queues: Vec<Value> =
        verdicts.iter().map(|verdict| Ok(verdict.json()?["queue"].clone())).collect::<Result<_>>()?;
    // One place in the lane: at most a few long ones can be done before the last short one.
    let long: Vec<usize> = (0..queues.len()).filter(|at| queues[*at] == "spun").collect();
    assert!(long.len() == 12 && long[6] >= 206, "long ones are done at {long:?} of 212");
    bed.one_verdict_each(212).await?;
    let slow = host.metrics().await?.get("mailroom_slow_guests_total", &[]);
    assert_eq!(slow, Some(12.0));
    Ok(())
}

/// Where others never leave a processor idle, a long guest gets on all the same: at worst at its second attempt.
#[tokio::test]
async fn long_guests_get_on_beside_those_that_take_all() -> Result<()> {
    let bed = Bed::new().await?;
    let mut host = bed.actor(&["--shards", "1", "--deadline", "2s", "--retry-min", "10ms"]).await?;
    host.until_ready(SOON).await?;
    let processor = (0..CpuSet::MAX_CPU).find(|cpu| sched_getaffinity(None).is_ok_and(|cpus| cpus.is_set(*cpu)));
    let mut processor_only = CpuSet::new();
    processor_only.set(processor.context("a processor")?);
    for thread in std::fs::read_dir(format!("/proc/{}/task", host.process().id()))? {
        let thread = thread?.file_name().to_str().and_then(|id| Pid::from_raw(id.parse().ok()?));
        sched_setaffinity(thread, &processor_only)?;
    }
    let done = Arc::new(AtomicBool::new(false));
    let busy = std::thread::spawn({
        let done = done.clone();
        move || {
            sched_setaffinity(None, &processor_only).expect("go to the host's processor");
            while !done.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        }
    });
    bed.tell(["grind 100"]).await?;
    let verdicts = bed.verdicts(1).await;
    done.store(true, Ordering::Relaxed);
    busy.join().expect("it only computes");
    verdicts?;
    bed.one_verdict_each(1).await
}

/// SIGTERM under full load: what runs is finished, what waits for a slot or for the slow lane is handed back at once
/// and not after the consumer's ack wait, and nothing is lost or doubled.
#[tokio::test]
async fn sigterm_under_load_hands_everything_back() -> Result<()> {
    const MAILS: usize = 3000;
    let bed = Bed::provisioned(&["--ack-wait", "5m"]).await?;
    bed.tell((0..MAILS).map(|n| match n % 50 {
        0 => "spin 20",
        1..10 => "sleep 5",
        _ => "verdict quick",
    }))
    .await?;
    let limits = ["--slots", "8", "--max-in-flight", "200"];
    for stopped_after in [500, 1500] {
        let mut host = bed.actor(&limits).await?;
        bed.verdicts(stopped_after).await?;
        assert_eq!(host.stop(SOON).await?.code(), Some(0));
        assert!(streams::count(&bed.jetstream, streams::VERDICTS).await? < MAILS as u64, "stopped when all was done");
    }
    let _last = bed.actor(&limits).await?;
    // SOON is far below the ack wait.
    bed.one_verdict_each(MAILS as u64).await
}

/// A verdict stream that is full refuses the next: the host says so, is not ready and fetches nothing more. Nobody's
/// message is at fault, and when there is room, all goes on.
#[tokio::test]
async fn a_full_verdict_stream_costs_no_message() -> Result<()> {
    let bed = Bed::new().await?;
    let stream = bed.jetstream.get_stream(streams::VERDICTS).await?;
    let mut config = stream.cached_info().config.clone();
    (config.max_messages, config.discard) = (10, DiscardPolicy::New);
    bed.jetstream.update_stream(&config).await?;
    let host = bed.actor(&["--attempts", "1", "--shards", "1", "--max-in-flight", "8"]).await?;
    bed.tell(repeat_n("verdict support", 50)).await?;
    let look = async || host.ready().await;
    eventually(SOON, "not ready", look, |ready| ready.0 == 503 && ready.1.contains("cannot be stored")).await?;
    host.wait_for_line(SOON, |line| line.contains("cannot store a verdict") && line.contains("maximum messages"))
        .await?;
    let info = bed.consumer().await?.info().await?.clone();
    assert!(info.delivered.consumer_sequence <= 18, "10 stored, 8 held, but {info:?}");
    config.max_messages = -1;
    bed.jetstream.update_stream(&config).await?;
    host.until_ready(SOON).await?;
    bed.one_verdict_each(50).await
}

/// A server that refuses the host's verdicts is no different: it gives no answer at all, and the host waits for one.
#[tokio::test]
async fn a_refused_verdict_costs_no_message() -> Result<()> {
    let users = |denied: &str| {
        format!(
            "authorization {{ users: [\n{{ user: admin, password: a }}\n\
             {{ user: host, password: h, permissions: {{ publish: {{ deny: '{denied}' }} }} }}\n] }}\n"
        )
    };
    let server = NatsServer::start_with(Settings { extra: users("verdict.>"), ..Settings::default() }).await?;
    let admin = server.url().replace("nats://", "nats://admin:a@");
    command::host(["provision", "--server", &admin]).await?.success()?;
    let options = async_nats::ConnectOptions::with_user_and_password("admin".to_owned(), "a".to_owned());
    let jetstream = async_nats::jetstream::new(server.client_with(options).await?);
    let mut bed = Bed { server, jetstream, patience: SOON };
    let args = ["--user", "host", "--password", "h", "--attempts", "1"];
    let host = Host::on(bed.server.url()).component(tools::component("actor")?).args(args).start().await?;
    host.until_ready(SOON).await?;
    bed.tell(repeat_n("verdict support", 20)).await?;
    let look = async || host.ready().await;
    eventually(SOON, "not ready", look, |ready| ready.0 == 503 && ready.1.contains("cannot be stored")).await?;
    host.wait_for_line(SOON, |line| line.contains("NATS refuses") && line.contains("verdict.")).await?;
    bed.server.reload(users("nothing"))?;
    host.until_ready(SOON).await?;
    bed.one_verdict_each(20).await
}

/// Resident memory of the host's process.
fn resident_kib(host: &mut Host) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", host.process().id()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
