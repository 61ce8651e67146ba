//! Everything may fail at any moment: every mail ends as one verdict or one dead letter, none is lost, none is doubled.

use async_nats::jetstream::stream::Config;
use tests::bed::{Bed, SOON};
use tests::mix::{self, Publisher};
use tests::prelude::*;
use tests::{Cluster, Fault, Fleet};

/// What decides all that is left to chance below.
const SEED: u64 = 4711;

/// So that what a host had in its hands comes again soon.
const SHORT: [&str; 4] = ["--ack-wait", "2s", "--deadline", "1500ms"];

/// For hosts that shall not hold too much, and shall not wait long after a failure. A delivery that was cut off counts
/// as one, but never makes an honest mail a dead letter.
const BRISK: [&str; 18] = [
    "--log",
    "info,guest=off",
    "--shards",
    "2",
    "--max-in-flight",
    "64",
    "--deadline",
    "1500ms",
    "--attempts",
    "5",
    "--max-deliver",
    "1000",
    "--retry-min",
    "20ms",
    "--retry-max",
    "200ms",
    "--park-after",
    "50ms",
];

/// Two hosts on one consumer are killed twenty times at random moments in a run of 20,000 mails.
#[tokio::test]
async fn hosts_killed_twenty_times_lose_and_double_nothing() -> Result<()> {
    const MAILS: u64 = 20_000;
    let mut fleet = Fleet::start(&SHORT, 2, &BRISK).await?;
    let mut random = fastrand::Rng::with_seed(SEED);
    let mut moments: Vec<u64> = std::iter::repeat_with(|| random.u64(..MAILS * 9 / 10)).take(20).collect();
    moments.sort_unstable();
    under_load(&mut fleet, MAILS, async |fleet| {
        for moment in moments {
            fleet.bed.outcomes(moment).await?;
            let killed = Fault::HostKilled(random.usize(..2));
            fleet.begin(killed).await?;
            fleet.end(killed).await?;
        }
        Ok(())
    })
    .await
}

/// The server is killed under load and comes back with what it has on its disk, three times.
#[tokio::test]
async fn a_killed_server_loses_and_doubles_nothing() -> Result<()> {
    const MAILS: u64 = 6000;
    let mut fleet = Fleet::start(&SHORT, 2, &BRISK).await?;
    under_load(&mut fleet, MAILS, async |fleet| {
        for moment in [500, 2000, 4000] {
            fleet.bed.outcomes(moment).await?;
            fleet.begin(Fault::ServerKilled).await?;
            until_told(fleet, 0, "no connection to NATS").await?;
            fleet.end(Fault::ServerKilled).await?;
            fleet.until_ready().await?;
        }
        Ok(())
    })
    .await
}

/// The network between a host and the server is cut without anybody being told, for longer than the consumer's
/// `ack_wait`. Another host takes over; this one notices by itself, says so, and goes on when the network does.
#[tokio::test]
async fn a_host_without_a_network_is_stood_in_for() -> Result<()> {
    const MAILS: u64 = 4000;
    let mut fleet = Fleet::start(&SHORT, 2, &BRISK).await?;
    under_load(&mut fleet, MAILS, async |fleet| {
        fleet.bed.outcomes(1000).await?;
        fleet.begin(Fault::Cut(0)).await?;
        until_told(fleet, 0, "no connection to NATS").await?;
        fleet.bed.outcomes(MAILS).await?;
        fleet.end(Fault::Cut(0)).await?;
        fleet.until_ready().await
    })
    .await
}

/// Hosts stand still, in turns, for longer than `ack_wait` and the duplicate window, with messages in their hands that
/// others settle meanwhile. What they still say when they wake changes nothing.
#[tokio::test]
async fn a_frozen_host_says_nothing_that_counts_when_it_wakes() -> Result<()> {
    let window = Duration::from_secs(3);
    let provision = [&SHORT[..], &["--duplicate-window", "3s"]].concat();
    let mut fleet = Fleet::start(&provision, 2, &BRISK).await?;
    let mut mails = Vec::new();
    for frozen in [0, 1] {
        let before = mails.len() as u64;
        mails.extend(mix::mails(SEED + before).take(2000));
        let mut publisher = Publisher::connect(fleet.bed.server.url(), &format!("mix {frozen}")).await?;
        let now = mails[before as usize..].to_vec();
        let publishing = tokio::spawn(async move { publisher.publish(now, None).await });
        fleet.bed.outcomes(before + 200).await?;
        fleet.begin(Fault::HostFrozen(frozen)).await?;
        let since = std::time::Instant::now();
        publishing.await??;
        // Settled by the other host: so `ack_wait` is over.
        fleet.bed.outcomes(mails.len() as u64).await?;
        eventually(SOON, "the window is over", async || Ok(since.elapsed()), |past| *past > window * 2).await?;
        fleet.end(Fault::HostFrozen(frozen)).await?;
        fleet.until_ready().await?;
        fleet.until_idle().await?;
    }
    fleet.bed.books_balance(mails.len() as u64).await.map(drop)
}

/// A host stands still before it has run what it holds. The others come to a verdict at the second delivery; that it
/// fails at the first, when it wakes, makes no dead letter of it.
#[tokio::test]
async fn a_late_failure_is_no_second_end() -> Result<()> {
    const MAILS: u64 = 40;
    let args = ["--shards", "1", "--slots", "1", "--max-in-flight", "16", "--deadline", "3s", "--attempts", "1"];
    let mut fleet = Fleet::start(&["--ack-wait", "4s", "--deadline", "3s"], 2, &args).await?;
    // Two of each kind: the server may deal them out to the hosts in turns.
    fleet.bed.tell((0..MAILS).map(|number| if number % 4 < 2 { "sleep 400" } else { "fail-until 2" })).await?;
    fleet.until_holds(0, 8.0).await?;
    fleet.begin(Fault::HostFrozen(0)).await?;
    fleet.bed.outcomes(MAILS).await?;
    fleet.end(Fault::HostFrozen(0)).await?;
    fleet.until_idle().await?;
    let books = fleet.bed.books_balance(MAILS).await?;
    ensure!(books.verdicts as u64 > MAILS / 2, "the frozen host held nothing that fails at first: {books:?}");
    Ok(())
}

/// A network on which everything takes its time, and connections that are reset again and again.
#[tokio::test]
async fn a_slow_and_unsteady_network_costs_time_only() -> Result<()> {
    const MAILS: u64 = 3000;
    let mut fleet = Fleet::start(&SHORT, 2, &BRISK).await?;
    for host in [0, 1] {
        fleet.begin(Fault::Slow(host)).await?;
    }
    under_load(&mut fleet, MAILS, async |fleet| {
        for moment in [300, 600, 900, 1200, 1500] {
            fleet.bed.outcomes(moment).await?;
            fleet.begin(Fault::Reset((moment / 300 % 2) as usize)).await?;
        }
        Ok(())
    })
    .await
}

/// A server without room for more takes neither mail nor verdict. The hosts say so, keep what they have, and go on when
/// there is room.
#[tokio::test]
async fn a_server_out_of_storage_costs_no_message() -> Result<()> {
    let account = "accounts { MAIL { jetstream { max_file: 2000000 }, users: [{ user: u, password: p }] } }\n";
    let extra = format!("{account}no_auth_user: u\n");
    let bed = Bed::on(NatsServer::start_with(Settings { extra, ..Settings::default() }).await?, &[]).await?;
    let ballast = Config { name: "BALLAST".to_owned(), subjects: vec!["ballast".to_owned()], ..Config::default() };
    bed.jetstream.create_stream(ballast).await?;
    bed.jetstream.publish("ballast", vec![0; 900_000].into()).await?.await?;
    let mut mails = 0;
    // Down to the last bytes, which are fewer than a verdict has.
    for bytes in [100_000, 10_000, 1000, 1] {
        let mail = format!("verdict support\n{}", "x".repeat(bytes));
        while bed.tell([&mail]).await.is_ok() {
            mails += 1;
            ensure!(mails < 100, "the server takes more than it has room for");
        }
    }
    // It may never be ready before it fails.
    let host =
        Host::on(bed.server.url()).component(tools::component("actor")?).args(["--attempts", "1"]).start().await?;
    let look = async || host.ready().await;
    eventually(SOON, "not ready", look, |ready| ready.0 == 503 && ready.1.contains("cannot be stored")).await?;
    host.wait_for_line(SOON, |line| line.contains("cannot store a verdict") && line.contains("resource")).await?;
    bed.jetstream.delete_stream("BALLAST").await?;
    host.until_ready(SOON).await?;
    bed.tell(["verdict support"]).await?;
    bed.one_verdict_each(mails + 1).await
}

/// In a cluster of three, the leader of the mails is killed and that of the verdicts stands still, each under load:
/// another server takes over, the hosts go on with it, and the one that comes back finds its place.
#[tokio::test]
async fn a_cluster_that_loses_a_leader_loses_no_message() -> Result<()> {
    const MAILS: u64 = 1500;
    let mut cluster = Cluster::start(&SHORT).await?;
    let mails: Vec<&str> = mix::mails(SEED).take(2 * MAILS as usize).collect();
    let mut hosts = Vec::new();
    for _ in 0..2 {
        let host = Host::on(&cluster.urls()).component(tools::component("actor")?).args(BRISK).start().await?;
        host.until_ready(SOON).await?;
        hosts.push(host);
    }
    for (round, stream) in [(0, streams::MAIL), (1, streams::VERDICTS)] {
        let before = round * MAILS;
        let now = mails[before as usize..][..MAILS as usize].to_vec();
        let mut publisher = Publisher::connect(&cluster.urls(), &format!("mix {round}")).await?;
        let publishing = tokio::spawn(async move { publisher.publish(now, Some(300)).await });
        cluster.bed.outcomes(before + 200).await?;
        let leader = cluster.leader(stream, None).await?;
        if stream == streams::MAIL {
            cluster.server(leader).kill();
        } else {
            cluster.server(leader).process().signal(Signal::STOP)?;
        }
        cluster.leader(stream, Some(leader)).await?;
        publishing.await??;
        // Without the one that is not there.
        cluster.bed.outcomes(before + MAILS).await?;
        if stream == streams::MAIL {
            cluster.server(leader).restart().await?;
        } else {
            cluster.server(leader).process().signal(Signal::CONT)?;
        }
    }
    cluster.bed.books_balance(2 * MAILS).await?;
    for host in &hosts {
        host.until_ready(SOON).await?;
    }
    Ok(())
}

/// Publishes mails of all kinds while `faults` happen; then the books have to balance, with every rejected mail among
/// the dead letters, and no host holds anything any more.
async fn under_load(fleet: &mut Fleet, count: u64, faults: impl AsyncFnOnce(&mut Fleet) -> Result<()>) -> Result<()> {
    let mails: Vec<&str> = mix::mails(SEED).take(count as usize).collect();
    let rejected = mails.iter().filter(|mail| **mail == mix::REJECTED).count();
    let mut publisher = Publisher::connect(fleet.bed.server.url(), "mix").await?;
    let publishing = tokio::spawn(async move { publisher.publish(mails, None).await });
    faults(fleet).await?;
    publishing.await??;
    let books = fleet.bed.books_balance(count).await?;
    ensure!(books.dead_letters.get("rejected") == Some(&rejected), "{rejected} rejected, but {:?}", books.dead_letters);
    fleet.until_ready().await?;
    fleet.until_idle().await
}

/// Waits until a host says that it is not ready, and why.
async fn until_told(fleet: &mut Fleet, host: usize, why: &str) -> Result<()> {
    let host = fleet.member(host);
    let look = async || host.ready().await;
    eventually(SOON, &format!("not ready: {why}"), look, |ready| ready.0 == 503 && ready.1.contains(why)).await?;
    Ok(())
}
