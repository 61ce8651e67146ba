//! How many hosts there are: what KEDA and Kubernetes decide, and hosts that come and go by it.

use tests::autoscaler::{Activation, Autoscaler, Settings};
use tests::bed::Bed;
use tests::prelude::*;
use tests::simulation::{Phase, Processes, Trigger, simulate};

const SECOND: Duration = Duration::from_secs(1);

/// The formula of Kubernetes' documentation, with its tolerance, its policies and its stabilization window.
#[test]
fn replicas_follow_the_metric_as_kubernetes_has_it() {
    let settings = Settings { stabilization: 60 * SECOND, ..Settings::default() };
    for (replicas, value, expected) in [
        (1, 0.0, 1),
        (1, 1099.0, 1),
        (1, 1101.0, 2),
        (1, 50_000.0, 5),
        (5, 50_000.0, 10),
        (10, 50_000.0, 20),
        (20, 50_000.0, 30),
        (30, 50_000.0, 30),
        (10, 10_900.0, 10),
        (10, 11_100.0, 12),
        (10, 9100.0, 10),
        (10, 4100.0, 5),
        (10, 0.0, 1),
    ] {
        let decided = Autoscaler::default().decide(SECOND, replicas, value, 1000.0, &settings);
        assert_eq!(decided, expected, "{replicas} with {value}");
    }
    let mut autoscaler = Autoscaler::default();
    let mut decide =
        |second: u32, replicas, value| autoscaler.decide(second * SECOND, replicas, value, 1000.0, &settings);
    assert_eq!(decide(0, 8, 8000.0), 8);
    assert_eq!(decide(30, 8, 2000.0), 8, "eight were wanted half a minute ago");
    assert_eq!(decide(61, 8, 1000.0), 2, "two were, and never more, for a minute");
    assert_eq!(decide(62, 2, 3000.0), 3, "more at once");
}

/// From zero at once, and back after the cool-down.
#[test]
fn there_are_hosts_while_there_is_something_to_do() {
    let settings = Settings { cooldown: 10 * SECOND, ..Settings::default() };
    let mut activation = Activation::default();
    let mut decide = |second: u32, replicas, active| activation.decide(second * SECOND, replicas, active, &settings);
    assert_eq!(decide(0, 0, false), 0);
    assert_eq!(decide(1, 0, true), 1);
    assert_eq!(decide(2, 7, true), 7);
    assert_eq!(decide(11, 7, false), 7);
    assert_eq!(decide(12, 7, false), 0);
}

/// With either trigger no mail is lost or has two verdicts while hosts come and go; with ours the first one, which finds no
/// host, does not wait for a poll.
#[tokio::test]
async fn hosts_come_and_go_and_no_mail_is_lost() -> Result<()> {
    let settings = Settings {
        polling_interval: 4 * SECOND,
        cooldown: SECOND,
        sync_period: SECOND,
        stabilization: 2 * SECOND,
        replicas_max: 6,
        lag_threshold: 100,
    };
    let phases = [
        Phase::Quiet(SECOND),
        Phase::Burst(1),
        Phase::UntilZero,
        Phase::Quiet(SECOND),
        Phase::Burst(1500),
        Phase::Steady(100, 4 * SECOND),
        Phase::UntilZero,
    ];
    let mut first = Vec::new();
    for trigger in [Trigger::BuiltIn, Trigger::Push] {
        let bed = Bed::new().await?;
        let hosts = Processes::of(bed.server.url());
        let outcome = simulate(&bed, hosts, trigger, &settings, &phases, 120 * SECOND).await?;
        let most = outcome.samples.iter().map(|sample| sample.replicas).max();
        ensure!(most > Some(2), "{trigger:?}: {most:?} hosts");
        ensure!(outcome.samples.last().is_some_and(|last| last.replicas == 0), "{trigger:?}: hosts are left");
        ensure!(outcome.books.verdicts > 1800, "{trigger:?}: {:?}", outcome.books);
        first.push(outcome.latencies.first().context("no verdict")?.1);
    }
    ensure!(first[1] < 2 * SECOND && first[1] < first[0], "to the first verdict: {first:?}");
    Ok(())
}
