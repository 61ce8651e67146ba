//! `bench count FILE…`: work for executables that count what they do, so that they are optimized for what hosts do. Each
//! settles mails as the cases of the bench have them, weighted by how common they are.

use crate::site::{Amount, LEAN, ORDINARY, Program, REMEMBERING, Site, Variant, mail, variant};
use anyhow::{Context as _, Result};
use std::path::PathBuf;
use std::time::Duration;

/// Mails of so many bytes, so many of them.
const MAILS: [(usize, u64); 2] = [(1024, 40_000), (4096, 10_000)];

/// Starts and stops of each, one after the other: what these do counts as well.
const STARTS: u32 = 50;

/// Lets each do its work. What it counted it writes when it ends.
pub async fn run(executables: impl Iterator<Item = String>) -> Result<()> {
    let mut site = Site::new(Amount { rounds: 1, messages: 0, load: Duration::ZERO, full: false }).await?;
    let executables: Vec<Vec<Variant>> = executables.map(works).collect::<Result<_>>()?;
    for (bytes, count) in MAILS {
        site.fill(&mail(bytes)?, count).await?;
        for work in executables.iter().flatten() {
            site.drain(work, 1).await?;
        }
    }
    for work in executables.iter().filter_map(|works| works.first()) {
        let consumer = site.consumer().await?;
        for _ in 0..STARTS {
            site.start(work, &consumer).await?.stop().await?;
        }
    }
    Ok(())
}

/// All that an executable is to do.
fn works(executable: String) -> Result<Vec<Variant>> {
    let name = PathBuf::from(&executable).file_name().context("an executable")?.to_owned();
    // For as long as this program runs.
    let executable: &'static str = executable.leak();
    let work = |component| variant("counted", executable, Program::Counted { executable, component });
    if name == "native-handler" {
        return Ok(vec![work(None)]);
    }
    let remembering = Variant { args: &["--keyvalue", "memory"], ..work(Some(REMEMBERING)) };
    Ok(vec![work(Some(LEAN)), work(Some(LEAN)), work(Some(ORDINARY)), remembering])
}
