//! What guests share through `wasi:keyvalue` and `mailroom:triage/claims`, in this process or on the server.

use std::collections::BTreeSet;
use tests::bed::{Bed, SOON};
use tests::prelude::*;

/// Everything that can be asked of a bucket, line by line, and what comes of it.
const ASKED: [(&str, &str); 33] = [
    ("get a", "nothing"),
    ("exists a", "false"),
    ("set a one", "done"),
    ("get a", "one"),
    ("exists a", "true"),
    ("set a two", "done"),
    ("get a", "two"),
    ("delete a", "done"),
    ("get a", "nothing"),
    ("exists a", "false"),
    ("delete a", "done"),
    ("claim a three", "three"),
    ("claim a four", "three"),
    ("get a", "three"),
    ("set-many b=1 c=2 b=3", "done"),
    ("get-many b c d b", "b=3 c=2 nothing b=3"),
    ("keys", "a b c"),
    ("delete-many a b e", "done"),
    ("keys", "c"),
    ("increment c 40", "42"),
    ("increment n 18446744073709551615", "18446744073709551615"),
    ("try increment n 1", "\"n\" would exceed 64 bits"),
    ("try increment m x", "x is no number"),
    ("set t text", "done"),
    ("try increment t 1", "\"t\" holds no number"),
    // What NATS takes for no key, for a wildcard, or for what this host made of another key.
    ("set ..*.> odd", "done"),
    ("get ..*.>", "odd"),
    ("set =Li4qLj4 plain", "done"),
    ("get ..*.>", "odd"),
    ("claim <müller@example.org> m-1", "m-1"),
    ("keys", "..*.> <müller@example.org> =Li4qLj4 c n t"),
    ("try long 0", "the key is empty"),
    ("try long 1025", "the key has 1025 bytes; at most 1024"),
];

/// Both kinds of memory do the same.
#[tokio::test]
async fn whatever_is_asked_is_done_alike() -> Result<()> {
    let mail = ASKED.map(|(line, _)| line).join("\n");
    for keyvalue in ["memory", "nats:triage"] {
        let bed = Bed::new().await?;
        let host = keeper(&bed, &["--keyvalue", keyvalue]).await?;
        // In pieces that fit into a verdict.
        for asked in ASKED.chunks(16) {
            bed.tell([asked.iter().map(|(line, _)| *line).collect::<Vec<_>>().join("\n")]).await?;
            bed.settled().await?;
        }
        let said = said(&bed).await?;
        let expected: Vec<&str> = ASKED.iter().map(|(_, said)| *said).collect();
        for (line, (said, expected)) in ASKED.iter().zip(said.iter().zip(&expected)) {
            ensure!(said == expected, "{keyvalue}: {}: {said}, not {expected}", line.0);
        }
        ensure!(said.len() == expected.len(), "{keyvalue}: {mail}: {said:?}");
        let metrics = host.metrics().await?;
        let calls = |operation, outcome| {
            metrics.get("mailroom_keyvalue_calls_total", &[("operation", operation), ("outcome", outcome)])
        };
        assert_eq!((calls("increment", "ok"), calls("increment", "error")), (Some(2.0), Some(2.0)));
        assert_eq!((calls("set-many", "ok"), calls("claim", "ok")), (Some(1.0), Some(3.0)));
        assert_eq!(metrics.get("mailroom_keyvalue_seconds_count", &[("operation", "list-keys")]), Some(3.0));
    }
    Ok(())
}

/// The bucket goes by its own name, by `default` and by none; there is no other.
#[tokio::test]
async fn there_is_one_bucket() -> Result<()> {
    let bed = Bed::new().await?;
    let _host = keeper(&bed, &["--keyvalue", "nats:triage"]).await?;
    bed.tell(["open default\nopen \nopen triage\ntry open other\nset k v"]).await?;
    bed.settled().await?;
    assert_eq!(said(&bed).await?, ["opened", "opened", "opened", "no such store", "done"]);
    let bucket = bed.jetstream.get_key_value("triage").await?;
    assert_eq!(bucket.get("k").await?.as_deref(), Some(&b"v"[..]));
    Ok(())
}

/// Hosts that claim the same keys at the same moment are all told the same.
#[tokio::test]
async fn two_hosts_agree_on_who_was_first() -> Result<()> {
    const KEYS: u64 = 200;
    let bed = Bed::new().await?;
    let mut hosts = Vec::new();
    for _ in 0..2 {
        let args = ["--keyvalue", "nats:triage", "--max-in-flight", "8"];
        hosts.push(keeper(&bed, &args).await?);
    }
    let claims = (0..KEYS * 4).map(|number| format!("claim key-{} by-{number}\nincrement count 1", number / 4));
    bed.tell(claims).await?;
    let verdicts = bed.verdicts(KEYS as usize * 4).await?;
    let mut winners = vec![BTreeSet::new(); KEYS as usize];
    let mut counts = BTreeSet::new();
    for verdict in &verdicts {
        let sequence = verdict.mail_sequence()? - 1;
        let reasons = verdict.json()?["reasons"].clone();
        winners[sequence as usize / 4].insert(reasons[0].as_str().context("a winner")?.to_owned());
        counts.insert(reasons[1].as_str().context("a count")?.parse::<u64>()?);
    }
    ensure!(winners.iter().all(|winners| winners.len() == 1), "{winners:?}");
    // No two counted to the same number; a message that came again counted again.
    ensure!(counts.len() as u64 == KEYS * 4, "{} counts", counts.len());
    for host in &hosts {
        let done = host.metrics().await?.get("mailroom_messages_total", &[("outcome", "verdict")]);
        ensure!(done.is_some_and(|done| done > 0.0), "one host did all");
    }
    Ok(())
}

/// A bucket that is away, or full, is an error that the guest sees; a mail that needs it waits for it.
#[tokio::test]
async fn a_bucket_that_is_away_costs_no_mail() -> Result<()> {
    let bed = Bed::new().await?;
    let host = keeper(&bed, &["--keyvalue", "nats:triage", "--retry-min", "100ms"]).await?;
    bed.tell(["set a 1"]).await?;
    bed.verdicts(1).await?;
    bed.jetstream.delete_stream("KV_triage").await?;
    bed.tell(["try get a\ntry set a 2\ntry claim a 3\ntry keys", "get a"]).await?;
    let verdict = bed.verdicts(2).await?.remove(1).json()?["reasons"].clone();
    let reasons: Vec<&str> =
        verdict.as_array().context("reasons")?.iter().filter_map(|reason| reason.as_str()).collect();
    ensure!(reasons.len() == 4 && reasons.iter().all(|reason| reason.contains("bucket triage: ")), "{reasons:?}");
    let look = async || Ok(host.metrics().await?.get("mailroom_messages_total", &[("outcome", "retry")]));
    eventually(SOON, "tried again", look, |retried| retried.is_some_and(|retried| retried > 1.0)).await?;
    bed.provision(&[]).await?;
    bed.one_verdict_each(3).await?;

    bed.provision(&["--bucket", "small", "--bucket-max-bytes", "1000"]).await?;
    drop(host);
    let _host = keeper(&bed, &["--keyvalue", "nats:small", "--output-max", "4MiB"]).await?;
    bed.tell(["fill a 400\ntry fill b 2000000\ntry fill b 400\ntry fill c 400\nexists b\nexists c"]).await?;
    let reasons = bed.verdicts(4).await?.remove(3).json()?["reasons"].clone();
    ensure!(reasons[1] == "write to bucket small: a value of 2000000 bytes: more than the server or the bucket takes");
    ensure!(reasons[3].as_str().is_some_and(|said| said.contains("maximum bytes exceeded")), "{reasons}");
    ensure!(reasons[4] == "true" && reasons[5] == "false", "{reasons}");
    Ok(())
}

/// A component is not given what nobody granted, and the flag that would grant it is named; so is a bucket that is not
/// there, and the command that makes it.
#[tokio::test]
async fn what_is_not_granted_is_named_with_its_flag() -> Result<()> {
    let keeper = tools::component("keeper")?.display().to_string();
    let refused = command::host(["triage", &keeper, "-"]).await?;
    ensure!(
        refused.code() == Some(1) && refused.stderr.contains("imports wasi:keyvalue/store@0.2.0-draft"),
        "{refused:?}"
    );
    ensure!(refused.stderr.contains("--keyvalue nats:BUCKET (or --keyvalue memory) grants"), "{refused:?}");
    let inspected = command::host(["inspect", &keeper]).await?.success()?.stdout;
    for interface in ["mailroom:triage/claims@0.1.0", "wasi:keyvalue/batch@0.2.0-draft"] {
        let line = inspected.lines().find(|line| line.contains(interface)).context(interface)?;
        ensure!(line.contains("granted by --keyvalue"), "{line}");
    }
    for (keyvalue, said) in [("redis:x", "nats:BUCKET, memory or none"), ("nats:a b", "' '"), ("nats:", "empty")] {
        let refused = command::host(["triage", &keeper, "-", "--keyvalue", keyvalue]).await?;
        ensure!(refused.code() == Some(2) && refused.stderr.contains(said), "{refused:?}");
    }
    let refused = command::host(["triage", &keeper, "-", "--keyvalue", "nats:triage"]).await?;
    ensure!(refused.code() == Some(1) && refused.stderr.contains("use --keyvalue memory"), "{refused:?}");

    let bed = Bed::new().await?;
    let args = ["run", "--component", &keeper, "--server", bed.server.url(), "--keyvalue", "nats:other"];
    let refused = command::host(args).await?;
    ensure!(refused.code() == Some(1), "{refused:?}");
    ensure!(
        refused.stderr.contains("no key-value bucket other; `host provision --bucket other` makes it"),
        "{refused:?}"
    );
    Ok(())
}

async fn keeper(bed: &Bed, args: &[&str]) -> Result<Host> {
    let host = Host::on(bed.server.url()).component(tools::component("keeper")?).args(args).start().await?;
    host.until_ready(SOON).await?;
    Ok(host)
}

/// What came of the lines, in the order of the mails.
async fn said(bed: &Bed) -> Result<Vec<String>> {
    let mut verdicts = streams::verdicts(&bed.jetstream).await?;
    verdicts.sort_by_key(|verdict| verdict.mail_sequence().unwrap_or(0));
    let mut said = Vec::new();
    for verdict in verdicts {
        let verdict = verdict.json()?;
        let reasons = verdict["reasons"].as_array().context("reasons")?;
        said.extend(reasons.iter().filter_map(|reason| reason.as_str()).map(str::to_owned));
    }
    Ok(said)
}
