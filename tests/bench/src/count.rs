//! `bench count FILE…`: work for executables that count what they do, so that they are optimized for what hosts do. What
//! they never do here is optimized for size.

use crate::site::{Amount, LEAN, ORDINARY, Program, REMEMBERING, Site, Variant, mail, variant};
use anyhow::{Context as _, Result, ensure};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tests::bed::{Bed, SOON};
use tests::{NatsServer, Settings, command, streams, tools};

/// Mails of so many bytes, so many of them.
const MAILS: [(usize, u64); 2] = [(1024, 40_000), (4096, 10_000)];

/// Starts and stops of each, one after the other.
const STARTS: u32 = 50;

/// Lets each do its work. What it counted it writes when it ends.
pub async fn run(executables: impl Iterator<Item = String>) -> Result<()> {
    let executables: Vec<String> = executables.collect();
    ensure!(!executables.is_empty(), "count: which executables? name their files");
    let folder = tempfile::Builder::new().prefix("mailroom-count-").tempdir().context("make a temporary folder")?;
    let (certificate, key) = certificate(folder.path()).await?;
    let extra = format!("tls {{ cert_file: {certificate:?}, key_file: {key:?} }}\nallow_non_tls: true");
    let server = NatsServer::start_with(Settings { extra, ..Settings::default() }).await?;
    let amount = Amount { rounds: 1, messages: 0, load: Duration::ZERO, full: false };
    let mut site = Site::on(Bed::on(server, &[]).await?, amount).await?;
    // For as long as this program runs.
    let tls: &[&str] = vec!["--tls-ca", &*certificate.leak()].leak();
    let executables: Vec<Vec<Variant>> =
        executables.into_iter().map(|executable| works(executable, tls)).collect::<Result<_>>()?;
    for (bytes, count) in MAILS {
        site.fill(&mail(bytes)?, count).await?;
        for work in executables.iter().flatten() {
            site.drain(work, 1).await?;
        }
    }
    site.empty(streams::MAIL).await?;
    for work in executables.iter().filter_map(|works| works.first()) {
        let consumer = site.consumer().await?;
        for _ in 0..STARTS {
            site.start(work, &consumer).await?.stop().await?;
        }
        site.forget(&consumer).await?;
    }
    Ok(())
}

/// All that an executable is to do; what hosts do most, twice.
fn works(executable: String, tls: &'static [&str]) -> Result<Vec<Variant>> {
    let name = PathBuf::from(&executable).file_name().context("an executable")?.to_owned();
    let executable: &'static str = executable.leak();
    let work = |component| variant("counted", executable, Program::Counted { executable, component });
    if name == "native-handler" {
        return Ok(vec![work(None), Variant { args: tls, ..work(None) }]);
    }
    let lean = || work(Some(LEAN));
    let remembering = Variant { args: &["--keyvalue", "memory"], ..work(Some(REMEMBERING)) };
    Ok(vec![lean(), lean(), Variant { args: tls, ..lean() }, work(Some(ORDINARY)), remembering])
}

/// Makes a certificate for this machine, which is its own authority, and its key.
async fn certificate(folder: &Path) -> Result<(String, String)> {
    let file = |name: &str| folder.join(name).to_string_lossy().into_owned();
    let (certificate, key) = (file("certificate.pem"), file("key.pem"));
    let mut args = vec!["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
    args.extend(["-days", "2", "-keyout", &key, "-out", &certificate, "-subj", "/CN=localhost"]);
    args.extend(["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"]);
    command::run(tools::installed("openssl", "openssl")?, args, b"", SOON).await?.success()?;
    Ok((certificate, key))
}
