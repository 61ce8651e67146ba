//! `cargo xtask simulate`: how hosts come and go with the work, by KEDA's own trigger and by `host scaler`.

use anyhow::{Context as _, Result, bail};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use tests::autoscaler::Settings;
use tests::bed::Bed;
use tests::lines::{Panel, svg};
use tests::program;
use tests::simulation::{Outcome, Phase, Processes, Trigger, simulate};

const HELP: &str = "\
How hosts come and go with the work: real hosts on a real nats-server, under KEDA's and Kubernetes' decisions, once with
KEDA's own trigger and once with `host scaler`.

Usage: cargo xtask simulate [--quick] [--burst N] [--rate N] [--cooldown SECONDS] [--out FOLDER]

  --quick              A burst of 5,000 and half a minute of steady work, instead of 50,000 and a minute
  --burst N            Mails that come at once
  --rate N             Mails a second after that
  --cooldown SECONDS   How long there has to be nothing to do before there is no host, and before there are fewer of
                       them; 15 unless said otherwise, where KEDA and Kubernetes wait for 300
  --out FOLDER         Where simulate.svg and simulate.json go; target/simulate unless said otherwise
";

/// How often it is looked how long the first mail takes when there is no host.
const FIRST_MAILS: usize = 3;

struct Wanted {
    burst: u32,
    rate: u32,
    steady: Duration,
    cooldown: Duration,
    out: PathBuf,
}

#[tokio::main]
async fn main() -> ExitCode {
    program(HELP, wanted(std::env::args().skip(1)), async |wanted| run(&wanted).await).await
}

fn wanted(mut args: impl Iterator<Item = String>) -> Result<Option<Wanted>> {
    let mut wanted = Wanted {
        burst: 50_000,
        rate: 600,
        steady: Duration::from_secs(60),
        cooldown: Duration::from_secs(15),
        out: PathBuf::from("target/simulate"),
    };
    while let Some(flag) = args.next() {
        let mut value = || args.next().with_context(|| format!("{flag}: add a value"));
        let number = |text: String| text.parse().with_context(|| format!("{flag} {text}: no number"));
        match flag.as_str() {
            "--help" | "-h" => return Ok(None),
            "--quick" => (wanted.burst, wanted.steady) = (5_000, Duration::from_secs(30)),
            "--burst" => wanted.burst = number(value()?)?,
            "--rate" => wanted.rate = number(value()?)?,
            "--cooldown" => wanted.cooldown = Duration::from_secs(number(value()?)?.into()),
            "--out" => wanted.out = value()?.into(),
            _ => bail!("{flag}: no such option"),
        }
    }
    Ok(Some(wanted))
}

async fn run(wanted: &Wanted) -> Result<()> {
    let settings = Settings { cooldown: wanted.cooldown, stabilization: wanted.cooldown, ..Settings::default() };
    let mut phases = Vec::new();
    for number in 0..FIRST_MAILS {
        // At different moments between two polls.
        let quiet = settings.polling_interval.mul_f64((number as f64 + 0.5) / FIRST_MAILS as f64);
        phases.extend([Phase::Quiet(quiet), Phase::Burst(1), Phase::UntilZero]);
    }
    let steady = Phase::Steady(wanted.rate, wanted.steady);
    phases.extend([Phase::Quiet(Duration::from_secs(5)), Phase::Burst(wanted.burst), steady, Phase::UntilZero]);
    let deadline = Duration::from_secs(1200) + wanted.steady + 10 * wanted.cooldown;
    let mut outcomes = Vec::new();
    for trigger in [Trigger::BuiltIn, Trigger::Push] {
        eprintln!("simulating with {} …", trigger.name());
        let mut bed = Bed::new().await?;
        let hosts = Processes::of(bed.server.url());
        let outcome = simulate(&bed, hosts, trigger, &settings, &phases, deadline).await?;
        bed.server.process().quiet();
        print(trigger, &outcome);
        outcomes.push((trigger, outcome));
    }
    write(&wanted.out, &outcomes)
}

fn print(trigger: Trigger, outcome: &Outcome) {
    let Outcome { samples, latencies, books } = outcome;
    let seconds: Vec<f64> = latencies.iter().map(|(_, latency)| latency.as_secs_f64()).collect();
    let (first, rest) = seconds.split_at(FIRST_MAILS.min(seconds.len()));
    let first: Vec<String> = first.iter().map(|seconds| format!("{seconds:.2}")).collect();
    let host_seconds: f64 =
        samples.windows(2).map(|two| f64::from(two[0].replicas) * (two[1].at - two[0].at).as_secs_f64()).sum();
    let most = samples.iter().map(|sample| sample.replicas).max().unwrap_or_default();
    println!("{}", trigger.name());
    println!("  first mail, no host up, to its verdict   {} s", first.join(", "));
    println!(
        "  burst and steady work, to their verdicts p50 {:.1} s, p99 {:.1} s, longest {:.1} s",
        percentile(rest, 0.5),
        percentile(rest, 0.99),
        percentile(rest, 1.0)
    );
    println!("  hosts                                    at most {most}, {host_seconds:.0} host seconds");
    println!(
        "  mails                                    {} sent, {} verdicts, {} lost, {} doubled",
        books.mails,
        books.verdicts,
        books.lost.len(),
        books.doubled.len()
    );
}

fn write(folder: &Path, outcomes: &[(Trigger, Outcome)]) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    let names: Vec<&str> = outcomes.iter().map(|(trigger, _)| trigger.name()).collect();
    let curves = |of: &dyn Fn(&Outcome) -> Vec<(f64, f64)>| outcomes.iter().map(|(_, outcome)| of(outcome)).collect();
    let panels = [
        Panel { title: "Mails that come, a second", curves: curves(&arrivals) },
        Panel {
            title: "Messages waiting or in flight",
            curves: curves(&|outcome| over_time(outcome, |sample| sample.lag as f64)),
        },
        Panel { title: "Hosts", curves: curves(&|outcome| over_time(outcome, |sample| sample.replicas.into())) },
        Panel { title: "From mail to verdict, seconds, the longest of each second", curves: curves(&slowest) },
    ];
    let picture = folder.join("simulate.svg");
    std::fs::write(&picture, svg(&names, &panels)).with_context(|| format!("write {}", picture.display()))?;
    let figures: Vec<_> = outcomes
        .iter()
        .map(|(trigger, outcome)| {
            let samples: Vec<_> = outcome
                .samples
                .iter()
                .map(|sample| (sample.at.as_secs_f64(), sample.sent, sample.lag, sample.replicas))
                .collect();
            json!({ "trigger": trigger.name(), "samples": samples })
        })
        .collect();
    let file = folder.join("simulate.json");
    std::fs::write(&file, serde_json::to_vec(&figures)?).with_context(|| format!("write {}", file.display()))?;
    println!("{}, {}", picture.display(), file.display());
    Ok(())
}

/// The value that so great a part of `values` does not exceed; 0 if there are none.
fn percentile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = (sorted.len() as f64 * part).ceil() as usize;
    sorted.get(place.saturating_sub(1)).copied().unwrap_or_default()
}

fn over_time(outcome: &Outcome, of: impl Fn(&tests::simulation::Sample) -> f64) -> Vec<(f64, f64)> {
    let mut curve: Vec<(f64, f64)> = Vec::new();
    let samples = outcome.samples.iter().map(|sample| (sample.at.as_secs_f64(), of(sample))).collect::<Vec<_>>();
    for (number, point) in samples.iter().enumerate() {
        let is_same = |other: usize| samples.get(other).is_some_and(|other| other.1 == point.1);
        // What lies on a level line says nothing.
        if number == 0 || !is_same(number - 1) || !is_same(number + 1) {
            curve.push(*point);
        }
    }
    curve
}

fn arrivals(outcome: &Outcome) -> Vec<(f64, f64)> {
    by_second(outcome, outcome.latencies.iter().map(|(at, _)| (*at, 1.0)), |sum, one| sum + one)
}

fn slowest(outcome: &Outcome) -> Vec<(f64, f64)> {
    let latencies = outcome.latencies.iter().map(|(at, latency)| (*at, latency.as_secs_f64()));
    by_second(outcome, latencies, f64::max)
}

fn by_second(
    outcome: &Outcome,
    values: impl Iterator<Item = (Duration, f64)>,
    join: impl Fn(f64, f64) -> f64,
) -> Vec<(f64, f64)> {
    let end = outcome.samples.last().map_or(0, |last| last.at.as_secs());
    let mut seconds = vec![0.0; end as usize + 1];
    for (at, value) in values {
        if let Some(second) = seconds.get_mut(at.as_secs() as usize) {
            *second = join(*second, value);
        }
    }
    seconds.iter().enumerate().map(|(second, value)| (second as f64, *value)).collect()
}
