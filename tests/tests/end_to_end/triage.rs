//! The triage with memory: what it remembers of earlier mails all hosts remember.

use std::collections::BTreeMap;
use tests::bed::{Bed, SOON};
use tests::prelude::*;

/// A mail of a thread: the first, or an answer to it.
fn mail(thread: usize, number: usize) -> String {
    let id = format!("<{number}.thread-{thread}@example.org>");
    let date = format!("Date: Mon, 2 Mar 2026 {:02}:{:02}:00 +0000", 8 + number, thread % 60);
    let (from, to) = match number {
        0 => ("ann@example.org", "desk@example.com"),
        _ if number.is_multiple_of(2) => ("ann@example.org", "help@example.com"),
        _ => ("help@example.com", "ann@example.org"),
    };
    let subject = format!("{}Printer {thread} jams", if number == 0 { "" } else { "Re: " });
    let root = format!("<0.thread-{thread}@example.org>");
    let answers = if number == 0 { String::new() } else { format!("In-Reply-To: {root}\nReferences: {root}\n") };
    format!("Message-ID: {id}\n{answers}{date}\nFrom: {from}\nTo: {to}\nSubject: {subject}\n\nText {number}.\n")
}

/// On the command line the first mail of a thread is new and the others are existing, one of which only has its subject.
#[tokio::test]
async fn a_thread_on_the_disk_is_one_issue() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let component = tools::component("triage-memory")?.display().to_string();
    let mut files = Vec::new();
    for number in 0..4 {
        let text = mail(1, number);
        let text = if number == 3 { text.replace("In-Reply-To", "X-In").replace("References", "X-Ref") } else { text };
        let path = folder.path().join(format!("{number}.eml")).display().to_string();
        std::fs::write(&path, text)?;
        files.push(path);
    }
    let args = ["triage", &component, "--keyvalue", "memory"];
    let said = command::host(args.iter().copied().chain(files.iter().map(String::as_str))).await?.success()?.stdout;
    let issues: Vec<serde_json::Value> = said
        .lines()
        .map(|line| Ok(serde_json::from_str::<serde_json::Value>(line)?["issue"].clone()))
        .collect::<Result<_>>()?;
    let kinds: Vec<_> = issues.iter().filter_map(|issue| issue["kind"].as_str()).collect();
    assert_eq!(kinds, ["new", "existing", "existing", "existing"]);
    ensure!(issues.iter().all(|issue| issue["id"] == issues[0]["id"]), "{said}");
    Ok(())
}

/// A model that was built in says who takes a mail, and how sure it is; the words of the samples do not speak beside it.
#[tokio::test]
async fn a_model_that_was_built_in_decides() -> Result<()> {
    let component = tools::component("triage-learned")?.display().to_string();
    let triage = async |number: usize, args: &[&str]| -> Result<serde_json::Value> {
        // Of the words that queue number N had more often: wN, wN+10, wN+20 and so on.
        let words: Vec<_> = (0..60).map(|word| format!("w{}", word * 10 + number)).collect();
        let mail = format!("From: stranger@example.com\nSubject: invoice\n\n{}\n", words.join(" "));
        let args = ["triage", &component].into_iter().chain(args.iter().copied()).chain(["-"]);
        let said = command::run(tools::host()?, args, mail.as_bytes(), SOON).await?.success()?.stdout;
        Ok(serde_json::from_str(said.trim())?)
    };
    for number in 0..10 {
        let verdict = triage(number, &[]).await?;
        assert_eq!(verdict["queue"], format!("q{number}"), "{verdict}");
        let reasons = verdict["reasons"].to_string();
        ensure!(reasons.contains(&format!("reads like mail for q{number}, confidence")), "{verdict}");
    }
    let unsure = triage(3, &["--config", "team.confidence=1"]).await?;
    ensure!(unsure["reasons"].to_string().contains("is below 100 %: default queue"), "{unsure}");
    Ok(())
}

/// Two hosts that see the mails of many threads at the same time give each thread one issue, which one mail opens.
#[tokio::test]
async fn two_hosts_give_a_thread_one_issue() -> Result<()> {
    const THREADS: usize = 100;
    const MAILS: usize = 4;
    let bed = Bed::new().await?;
    let component = tools::component("triage-memory")?;
    let mut hosts = Vec::new();
    for _ in 0..2 {
        // Few at a time, so that both get some of each thread.
        let args = ["--keyvalue", "nats:triage", "--max-in-flight", "8"];
        let host = Host::on(bed.server.url()).component(component.clone()).args(args).start().await?;
        host.until_ready(SOON).await?;
        hosts.push(host);
    }
    bed.tell((0..THREADS).flat_map(|thread| (0..MAILS).map(move |number| mail(thread, number)))).await?;
    let verdicts = bed.verdicts(THREADS * MAILS).await?;
    let mut threads: BTreeMap<String, Vec<(u64, String)>> = BTreeMap::new();
    for verdict in &verdicts {
        let issue = verdict.json()?["issue"].clone();
        let (kind, id) = (issue["kind"].as_str().context("a kind")?, issue["id"].as_str().context("an id")?);
        let thread = (verdict.mail_sequence()? - 1) / MAILS as u64;
        threads.entry(id.to_owned()).or_default().push((thread, kind.to_owned()));
    }
    ensure!(threads.len() == THREADS, "{} issues", threads.len());
    for (id, mails) in &threads {
        let opened = mails.iter().filter(|(_, kind)| kind == "new").count();
        let alike = mails.iter().all(|(thread, _)| *thread == mails[0].0);
        ensure!(mails.len() == MAILS && opened == 1 && alike, "{id}: {mails:?}");
    }
    bed.one_verdict_each((THREADS * MAILS) as u64).await
}
