//! The triage behind HTTP, under plain `wasmtime serve`: the same verdicts, without any host of ours.

use serde_json::Value;
use std::ffi::OsStr;
use std::process::Command;
use tests::prelude::*;

/// Longest wait for `wasmtime serve` to compile the component and listen.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// `wasmtime serve triage-http.wasm` on a free port, without any further option.
struct Served {
    _process: Process,
    url: String,
}

impl Served {
    async fn start() -> Result<Self> {
        let mut command = Command::new(tools::wasmtime()?);
        command.args(["serve", "--addr", "127.0.0.1:0"]).arg(tools::component("triage-http")?);
        let process = Process::spawn("wasmtime serve", command)?;
        let line = process.wait_for_line(START_DEADLINE, |line| line.contains("http://127.0.0.1:")).await?;
        let url = line.split(' ').find(|word| word.starts_with("http://")).context("the line has no URL")?;
        let url = url.trim_end_matches('/').to_owned();
        Ok(Self { _process: process, url })
    }

    async fn post(&self, query: &str, mail: &[u8]) -> Result<http::Response> {
        http::request("POST", &format!("{}/{query}", self.url), mail).await
    }
}

/// What `host triage` prints about the sample mails, a line each.
async fn triaged(args: &[&str]) -> Result<Vec<String>> {
    let component = tools::component("triage")?;
    let mails = tools::mails()?;
    let paths = std::iter::once(&component).chain(&mails).map(|path| path.as_os_str());
    let args = std::iter::once(OsStr::new("triage")).chain(paths).chain(args.iter().map(OsStr::new));
    Ok(command::host(args).await?.stdout.lines().map(str::to_owned).collect())
}

/// A rule tried with curl decides as it will in the host: for every sample mail the answer is, byte for byte, what
/// `host triage` prints, and a mail that has no verdict gets 422 and the same reason.
#[tokio::test]
async fn every_sample_mail_gets_the_same_json_as_from_the_host() -> Result<()> {
    let served = Served::start().await?;
    let mut verdicts = triaged(&["--json"]).await?.into_iter();
    let named = triaged(&["--json", "--names"]).await?;
    let mails = tools::mails()?;
    assert_eq!(named.len(), mails.len());
    let mut rejected = 0;
    for (path, named) in mails.iter().zip(&named) {
        let named: Value = serde_json::from_str(named)?;
        assert_eq!(named["mail"], *path.to_string_lossy());
        let answer = served.post("", &std::fs::read(path)?).await?;
        let name = path.display();
        ensure!(answer.head.to_lowercase().contains("content-type: application/json"), "{name}: {answer:?}");
        if let Some(failure) = named["failure"].as_str() {
            rejected += 1;
            let said: Value = serde_json::from_str(&answer.body)?;
            assert_eq!((answer.status, &said["failure"]), (422, &Value::from("reject")), "{name}");
            assert_eq!(format!("rejected: {}", said["reason"].as_str().unwrap_or_default()), failure, "{name}");
        } else {
            assert_eq!(answer.status, 200, "{name}: {answer:?}");
            assert_eq!(Some(answer.body.trim_end()), verdicts.next().as_deref(), "{name}");
        }
    }
    assert_eq!(verdicts.next(), None);
    ensure!(rejected >= 2, "the sample mails hold some that are none");
    Ok(())
}

/// The query string configures the rules as `--config` does in the host, percent-encoding and all, and a mistake in it
/// is told from a mistake in the mail.
#[tokio::test]
async fn the_query_string_is_the_configuration() -> Result<()> {
    let served = Served::start().await?;
    let (queue, words) = ("queue.default=help-desk", "priority.urgent=hi, hello there");
    let verdicts = triaged(&["--json", "--config", queue, "--config", words]).await?;
    let plain = triaged(&["--json"]).await?;
    let mut expected = verdicts.iter();
    let mut changed = 0;
    for (path, named) in tools::mails()?.iter().zip(triaged(&["--json", "--names"]).await?) {
        let named: Value = serde_json::from_str(&named)?;
        if named.get("verdict").is_some() {
            let query = "?queue.default=help-desk&priority.urgent=hi,%20hello+there";
            let answer = served.post(query, &std::fs::read(path)?).await?;
            assert_eq!((answer.status, Some(answer.body.trim_end())), (200, expected.next().map(String::as_str)));
            changed += usize::from(!plain.contains(&answer.body.trim_end().to_owned()));
        }
    }
    ensure!(changed > 0, "the configuration changed nothing");

    let mail = b"Subject: hi\n\nhi\n";
    for (query, key) in [("?no.such.key=1", "no.such.key"), ("?queue.default=Help%20Desk", "Help Desk")] {
        let answer = served.post(query, mail).await?;
        assert_eq!(answer.status, 400, "{answer:?}");
        ensure!(answer.body.contains(key), "does not name {key}: {answer:?}");
    }
    Ok(())
}

/// Whoever opens the address in a browser is told what to do.
#[tokio::test]
async fn get_explains_itself() -> Result<()> {
    let served = Served::start().await?;
    let answer = http::get(&format!("{}/", served.url)).await?;
    assert_eq!(answer.status, 200);
    ensure!(answer.head.contains("text/plain"), "{answer:?}");
    for words in ["POST", "curl --data-binary @", "queue.default", "413", "422"] {
        ensure!(answer.body.contains(words), "not {words:?}: {answer:?}");
    }
    Ok(())
}

/// What is no way to ask for a verdict is refused with the ways that are.
#[tokio::test]
async fn other_methods_are_refused() -> Result<()> {
    let served = Served::start().await?;
    for method in ["PUT", "DELETE", "PATCH", "BREW"] {
        let answer = http::request(method, &format!("{}/", served.url), b"").await?;
        assert_eq!(answer.status, 405, "{method}: {answer:?}");
        ensure!(answer.head.to_lowercase().contains("allow: get, post"), "{method}: {answer:?}");
    }
    Ok(())
}

/// A mail beyond the limit is refused by its size, and the next one is answered; one at the limit is read.
#[tokio::test]
async fn a_mail_that_is_too_large_is_refused() -> Result<()> {
    const LIMIT_BYTES: usize = 32 << 20;
    let served = Served::start().await?;
    let mut mail = b"Subject: outage\n\n".to_vec();
    mail.resize(LIMIT_BYTES + 1, b'x');
    let answer = served.post("", &mail).await?;
    assert_eq!(answer.status, 413, "{answer:?}");
    ensure!(answer.body.contains("32 MiB"), "{answer:?}");
    mail.pop();
    assert_eq!(served.post("", &mail).await?.status, 200);
    Ok(())
}
