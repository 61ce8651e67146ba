//! `cargo bench --package bench`: the time for one message in one thread, by criterion, which keeps the figures of the
//! run before to compare with. `cargo xtask bench instances` measures the same in turns, as processor time.

use anyhow::{Context as _, Result};
use bench::contestants::{contestants, message};
use criterion::{BenchmarkId, Criterion, Throughput};
use std::fs;
use tests::tools;

fn main() -> Result<()> {
    let mails = tools::mails()?;
    let mail = fs::read(mails.first().context("a sample mail")?)?;
    let bytes = mail.len() as u64;
    let message = message(mail);
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("message");
    group.throughput(Throughput::Bytes(bytes));
    for contestant in contestants()? {
        let mut work = contestant.prepare()?;
        group.bench_function(BenchmarkId::from_parameter(contestant.key), |bencher| bencher.iter(|| work(&message)));
    }
    group.finish();
    criterion.final_summary();
    Ok(())
}
