//! What guests ask servers through `wasi:http`, of those that the operator lists.

use rcgen::{CertifiedKey, generate_simple_self_signed};
use serde_json::Value;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tests::bed::{Bed, SOON};
use tests::prelude::*;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::net::TcpListener;
use tokio::sync::Barrier;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::{ServerConfig, crypto::ring, pki_types::PrivateKeyDer};

/// A small HTTP server on loopback, which does what paths say.
struct Site {
    port: u16,
    connections: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

impl Site {
    async fn new() -> Result<Self> {
        Self::with(None).await
    }

    async fn with(tls: Option<TlsAcceptor>) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let connections = Arc::new(AtomicUsize::new(0));
        let counted = connections.clone();
        let met = Arc::new(Barrier::new(2));
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut conversations = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::Relaxed);
                let (tls, met) = (tls.clone(), met.clone());
                conversations.spawn(async move {
                    // A client that goes away is part of some tests.
                    let _ = match tls {
                        Some(tls) => match tls.accept(stream).await {
                            Ok(stream) => converse(stream, &met).await,
                            Err(_) => Ok(()),
                        },
                        None => converse(stream, &met).await,
                    };
                });
            }
        });
        Ok(Self { port, connections, _tasks: tasks })
    }

    /// Where guests ask by the address, and how it is listed.
    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

/// Answers one request.
async fn converse(stream: impl AsyncRead + AsyncWrite + Unpin, met: &Barrier) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if stream.read_line(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let target = head.split(' ').nth(1).unwrap_or_default();
    let (path, argument) = target.split_once('?').unwrap_or((target, ""));
    let number = argument.parse::<usize>().unwrap_or(0);
    let answer = match path {
        "/hello" => "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello".to_owned(),
        // What arrived, without the names of the headers that every request has.
        "/head" => format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{head}", head.len()),
        "/redirect" => format!("HTTP/1.1 302 Found\r\nlocation: {argument}\r\ncontent-length: 0\r\n\r\n"),
        "/declared" => format!("HTTP/1.1 200 OK\r\ncontent-length: {number}\r\n\r\n{}", "x".repeat(number)),
        "/chunked" => format!(
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{number:x}\r\n{}\r\n0\r\n\r\n",
            "x".repeat(number)
        ),
        "/long-head" => format!("HTTP/1.1 200 OK\r\nx: {}\r\ncontent-length: 0\r\n\r\n", "x".repeat(number)),
        "/cut" => "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhello".to_owned(),
        "/nonsense" => "what do you want\r\n\r\n".to_owned(),
        // Takes the body to its end, in whatever form it comes.
        "/take" => {
            let mut taken = Vec::new();
            while !taken.ends_with(b"0\r\n\r\n") && stream.read_buf(&mut taken).await? > 0 {}
            let told = format!("took {}", taken.iter().filter(|&&byte| byte == b'x').count());
            format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{told}", told.len())
        }
        // Answers two that are there at the same time, and never one alone.
        "/meet" => {
            met.wait().await;
            "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nmet".to_owned()
        }
        "/silent" => return stream.read_to_string(&mut head).await.map(drop),
        "/stuck" => {
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhello").await?;
            stream.flush().await?;
            return stream.read_to_string(&mut head).await.map(drop);
        }
        _ => "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n".to_owned(),
    };
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await
}

/// What the guest says when it is told `mail`, with the servers of `allowed` listed.
async fn told(allowed: &[&str], args: &[&str], mail: &str) -> Result<Vec<String>> {
    let caller = tools::component("caller")?.display().to_string();
    let mut all = vec!["triage", &caller, "-"];
    allowed.iter().for_each(|server| all.extend(["--allow-http", server]));
    all.extend(args);
    if !args.contains(&"--deadline") {
        // The machine may be busy.
        all.extend(["--deadline", "20s"]);
    }
    let stdout = command::run(tools::host()?, all, mail.as_bytes(), SOON).await?.success()?.stdout;
    let verdict: Value = serde_json::from_str(&stdout)?;
    let reasons = verdict["reasons"].as_array().context("reasons")?;
    Ok(reasons.iter().filter_map(Value::as_str).map(str::to_owned).collect())
}

/// What the guest is told of the error that `mail` leads to.
async fn refused(allowed: &[&str], args: &[&str], mail: &str, error: &str) -> Result<()> {
    let said = told(allowed, args, mail).await?;
    ensure!(said.len() == 1 && said[0].contains(error), "{mail}: {said:?}, not {error}");
    Ok(())
}

/// A server that is listed answers, by its address or by its name; it sees an ordinary request that names it.
#[tokio::test]
async fn a_listed_server_is_asked() -> Result<()> {
    let site = Site::new().await?;
    let url = site.url();
    assert_eq!(told(&[&url], &[], &format!("ask GET {url}/hello")).await?, ["200 5 hello"]);
    let by_name = format!("http://localhost:{}", site.port);
    let said = told(&[&by_name, "127.0.0.0/8"], &[], &format!("ask GET {by_name}/head")).await?;
    let host = format!("host: localhost:{}", site.port);
    ensure!(said[0].contains("GET /head HTTP/1.1") && said[0].contains(&host), "{said:?}");
    assert_eq!(told(&[&url], &[], &format!("send {url}/take 300000")).await?, ["200 11 took 300000"]);
    // The variable lists with commas. Proxies that the environment names are not used.
    let (host, caller) = (tools::host()?.display().to_string(), tools::component("caller")?.display().to_string());
    let listed = format!("MAILROOM_ALLOW_HTTP=https://example.org,{url}");
    let args = ["http_proxy=http://127.0.0.1:1", &listed, &host, "triage", &caller, "-"];
    let said = command::run("env", args, format!("ask GET {url}/hello").as_bytes(), SOON).await?.success()?.stdout;
    ensure!(said.contains("200 5 hello"), "{said}");
    Ok(())
}

/// Nothing is asked that is not listed: another host, port or scheme, or a tunnel through a server that is.
#[tokio::test]
async fn what_is_not_listed_is_denied() -> Result<()> {
    let (site, other) = (Site::new().await?, Site::new().await?);
    let (url, elsewhere) = (site.url(), other.url());
    for mail in [
        format!("ask GET {elsewhere}/hello"),
        format!("ask GET https://127.0.0.1:{}/hello", site.port),
        format!("ask GET http://localhost:{}/hello", site.port),
        format!("ask GET http://[::ffff:127.0.0.1]:{}/hello", site.port),
        format!("ask GET http://2130706433:{}/hello", site.port),
        format!("ask GET http://x@127.0.0.1:{}/hello", site.port),
        format!("ask CONNECT {url}/hello"),
    ] {
        refused(&[&url, "127.0.0.0/8"], &[], &mail, "HttpRequestDenied").await?;
    }
    ensure!(site.connections() + other.connections() == 0, "somebody was asked");
    Ok(())
}

/// A name that is listed may not lead into a private network, unless that is listed too.
#[tokio::test]
async fn a_name_does_not_lead_into_a_private_network() -> Result<()> {
    let site = Site::new().await?;
    let by_name = format!("http://localhost:{}", site.port);
    let mail = format!("ask GET {by_name}/hello");
    refused(&[&by_name], &[], &mail, "DestinationIpProhibited").await?;
    refused(&[&by_name, "10.0.0.0/8"], &[], &mail, "DestinationIpProhibited").await?;
    refused(&[&by_name, "http://127.0.0.1:1"], &[], &mail, "DestinationIpProhibited").await?;
    ensure!(site.connections() == 0, "it was asked");
    for also in ["127.0.0.1/32", &site.url()] {
        assert_eq!(told(&[&by_name, also], &[], &mail).await?, ["200 5 hello"]);
    }
    Ok(())
}

/// A redirect is an answer. Whoever follows it asks anew, and is denied what is not listed.
#[tokio::test]
async fn a_redirect_leads_nowhere_else() -> Result<()> {
    let (site, other) = (Site::new().await?, Site::new().await?);
    let (url, elsewhere) = (site.url(), other.url());
    let said = told(&[&url], &[], &format!("follow {url}/redirect?{elsewhere}/hello")).await?;
    ensure!(said.len() == 2 && said[0].starts_with("302") && said[1].contains("HttpRequestDenied"), "{said:?}");
    ensure!((site.connections(), other.connections()) == (1, 0), "followed");
    assert_eq!(told(&[&url], &[], &format!("follow {url}/redirect?{url}/hello")).await?[1], "200 5 hello");
    Ok(())
}

/// A server that takes too long is an error that the guest sees before its own time is over.
#[tokio::test]
async fn a_slow_server_is_a_timeout_for_the_guest() -> Result<()> {
    let site = Site::new().await?;
    let url = site.url();
    for path in ["silent", "stuck"] {
        refused(&[&url], &["--deadline", "2s"], &format!("ask GET {url}/{path}"), "HttpResponseTimeout").await?;
    }
    // So many at once, and the others are told so.
    let said = told(&[&url], &["--deadline", "2s"], &format!("together {url}/silent 10")).await?;
    ensure!(said[..8].iter().all(|said| said.contains("HttpResponseTimeout")), "{said:?}");
    ensure!(said[8..].iter().all(|said| said.contains("ConnectionLimitReached")), "{said:?}");
    Ok(())
}

/// Bodies and heads have bounds, whether or not their length is said before.
#[tokio::test]
async fn what_is_too_large_is_refused() -> Result<()> {
    let site = Site::new().await?;
    let url = site.url();
    let args = ["--http-body-max", "100KiB"];
    assert_eq!(told(&[&url], &args, &format!("ask GET {url}/chunked?102400")).await?[0][..10], *"200 102400");
    for (mail, error) in [
        (format!("ask GET {url}/chunked?102401"), "HttpResponseBodySize"),
        (format!("ask GET {url}/declared?102401"), "HttpResponseBodySize"),
        (format!("ask GET {url}/long-head?200000"), "HttpResponseHeaderSectionSize"),
        (format!("send {url}/take 102401"), "HttpRequestBodySize"),
        (format!("declare {url}/take 102401"), "HttpRequestBodySize"),
        (format!("ask GET {url}/{}", "x".repeat(9000)), "HttpRequestUriTooLong"),
    ] {
        refused(&[&url], &args, &mail, error).await?;
    }
    Ok(())
}

/// What a server does wrong the guest is told, each thing by its name.
#[tokio::test]
async fn what_goes_wrong_is_told() -> Result<()> {
    let site = Site::new().await?;
    let url = site.url();
    let nobody = TcpListener::bind("127.0.0.1:0").await?.local_addr()?;
    let nobody = format!("http://{nobody}");
    for (mail, error) in [
        (format!("ask GET {url}/cut"), "HttpResponseIncomplete"),
        (format!("ask GET {url}/nonsense"), "HttpProtocolError"),
        (format!("ask GET {nobody}/"), "ConnectionRefused"),
        ("ask GET http://nobody.invalid/".to_owned(), "Dns"),
    ] {
        refused(&[&url, &nobody, "http://nobody.invalid"], &[], &mail, error).await?;
    }
    Ok(())
}

/// An instance that hoards what takes memory of the host's is broken off.
#[tokio::test]
async fn header_sections_do_not_pile_up() -> Result<()> {
    let caller = tools::component("caller")?.display().to_string();
    let args = ["triage", &caller, "-", "--allow-http", "http://127.0.0.1:1", "--deadline", "20s"];
    let broken = command::run(tools::host()?, args, b"fields", SOON).await?;
    ensure!(broken.code() == Some(1) && broken.stderr.contains("resource table"), "{broken:?}");
    Ok(())
}

/// An encrypted connection is one to a server that an authority vouches for, under the name that was asked for.
#[tokio::test]
async fn servers_prove_who_they_are() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let CertifiedKey { cert, key_pair } = generate_simple_self_signed(["localhost".to_owned()])?;
    let ca = folder.path().join("ca.pem");
    std::fs::write(&ca, cert.pem())?;
    let ca = ca.display().to_string();
    let key = PrivateKeyDer::Pkcs8(key_pair.serialize_der().into());
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let config = config.with_safe_default_protocol_versions()?.with_no_client_auth();
    let config = config.with_single_cert(vec![cert.der().clone()], key)?;
    let site = Site::with(Some(TlsAcceptor::from(Arc::new(config)))).await?;
    let (name, address) = (format!("localhost:{}", site.port), format!("https://127.0.0.1:{}", site.port));
    let allowed = [name.as_str(), &address];
    let mail = format!("ask GET https://{name}/hello");
    assert_eq!(told(&allowed, &["--http-ca", &ca], &mail).await?, ["200 5 hello"]);
    refused(&allowed, &["--http-ca", &ca], &format!("ask GET {address}/hello"), "TlsCertificateError").await?;
    let CertifiedKey { cert: other, .. } = generate_simple_self_signed(["localhost".to_owned()])?;
    std::fs::write(&ca, other.pem())?;
    refused(&allowed, &["--http-ca", &ca], &mail, "TlsCertificateError").await?;
    let plain = Site::new().await?;
    let plain = format!("https://127.0.0.1:{}", plain.port);
    refused(&[&plain], &["--http-ca", &ca], &format!("ask GET {plain}/hello"), "TlsProtocolError").await
}

/// A component that asks servers is refused without the grant, and the flag is named; so is a list that is none.
#[tokio::test]
async fn asking_has_to_be_granted() -> Result<()> {
    let caller = tools::component("caller")?.display().to_string();
    let refused = command::host(["triage", &caller, "-"]).await?;
    ensure!(refused.code() == Some(1) && refused.stderr.contains("imports wasi:http/"), "{refused:?}");
    ensure!(refused.stderr.contains("--allow-http https://HOST[:PORT] grants"), "{refused:?}");
    let inspected = command::host(["inspect", &caller]).await?.success()?.stdout;
    let line = inspected.lines().find(|line| line.contains("wasi:http/outgoing-handler")).context("no import")?;
    ensure!(line.contains("granted by --allow-http https://HOST[:PORT]"), "{line}");
    for (args, code, said) in [
        (["--allow-http", "https://example.org/path"], 2, "NETWORK/BITS"),
        (["--allow-http", "10.0.0.1/8"], 2, "first address"),
        (["--allow-http", "10.0.0.0/8"], 1, "no server"),
        (["--http-ca", "ca.pem"], 2, "--allow-http"),
    ] {
        let refused = command::host(["triage", &caller, "-"].iter().chain(&args)).await?;
        ensure!(refused.code() == Some(code) && refused.stderr.contains(said), "{args:?}: {refused:?}");
    }
    let missing = ["--allow-http", "https://example.org", "--http-ca", "/nonexistent/ca.pem"];
    let refused = command::host(["triage", &caller, "-"].iter().chain(&missing)).await?;
    ensure!(refused.code() == Some(1) && refused.stderr.contains("read --http-ca /nonexistent/ca.pem"), "{refused:?}");
    Ok(())
}

/// Guests on one shard wait for their servers at the same time, and what came of it is counted.
#[tokio::test]
async fn guests_wait_side_by_side_and_are_counted() -> Result<()> {
    let site = Site::new().await?;
    let url = site.url();
    let bed = Bed::new().await?;
    let args = ["--shards", "1", "--allow-http", &url, "--deadline", "20s"];
    let host = Host::on(bed.server.url()).component(tools::component("caller")?).args(args).start().await?;
    host.until_ready(SOON).await?;
    let mails = [format!("ask GET {url}/meet"), format!("ask GET {url}/meet"), "ask GET http://other.test/".to_owned()];
    bed.tell(mails).await?;
    let mut verdicts = bed.verdicts(3).await?;
    verdicts.sort_by_key(|verdict| verdict.mail_sequence().unwrap_or(0));
    for verdict in &verdicts[..2] {
        ensure!(verdict.json()?["reasons"][0] == "200 3 met", "{:?}", verdict.json());
    }
    let metrics = host.metrics().await?;
    let count = |outcome| metrics.get("mailroom_http_requests_total", &[("outcome", outcome)]);
    assert_eq!((count("response"), count("denied")), (Some(2.0), Some(1.0)));
    assert_eq!(metrics.get("mailroom_http_seconds_count", &[]), Some(3.0));
    Ok(())
}
