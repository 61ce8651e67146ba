//! The harness checks itself: a test that leans on it must not pass because a part was quietly missing.

use std::net::TcpStream;
use std::path::Path;
use tests::prelude::*;
use tests::{Books, Proxy};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const SOON: Duration = Duration::from_secs(20);

/// A test's server comes back after a crash where its clients look for it, with what they stored, and is gone
/// afterwards: no process, no listening port, no folder.
#[tokio::test]
async fn server_restarts_on_its_port_with_its_data_and_is_gone_when_dropped() -> Result<()> {
    let mut server = NatsServer::start().await?;
    let url = server.url().to_owned();
    let monitoring = server.monitoring().to_owned();
    let jetstream = server.jetstream().await?;
    let config = async_nats::jetstream::stream::Config {
        name: "MAIL".to_owned(),
        subjects: vec!["mail.>".to_owned()],
        ..Default::default()
    };
    jetstream.create_stream(config).await?;
    for mail in ["one", "two"] {
        jetstream.publish("mail.test", mail.into()).await?.await?;
    }

    server.kill();
    ensure!(TcpStream::connect(url.trim_start_matches("nats://")).is_err(), "a killed server still listens");
    server.restart().await?;
    assert_eq!((server.url(), server.monitoring()), (url.as_str(), monitoring.as_str()));
    let jetstream = server.jetstream().await?;
    assert_eq!(streams::count(&jetstream, "MAIL").await?, 2);
    server.restart().await?;
    let jetstream = server.jetstream().await?;
    let stored = streams::messages(&jetstream, "MAIL").await?;
    let stored: Vec<_> = stored.iter().map(|mail| (mail.sequence, mail.subject.as_str(), &mail.payload[..])).collect();
    assert_eq!(stored, [(1, "mail.test", &b"one"[..]), (2, "mail.test", b"two")]);
    assert_eq!(http::get(&format!("{monitoring}/healthz")).await?.status, 200);

    let pid = server.process().id();
    let folder = server.folder().to_owned();
    drop(server);
    ensure!(!Path::new(&format!("/proc/{pid}")).exists(), "process {pid} is left");
    ensure!(!folder.exists(), "{} is left", folder.display());
    ensure!(TcpStream::connect(url.trim_start_matches("nats://")).is_err(), "something still listens");
    Ok(())
}

/// Extra settings take effect, and a server that refuses them says why at once.
#[tokio::test]
async fn server_takes_extra_settings() -> Result<()> {
    let extra = "authorization { user: mail, password: room }\nmax_payload: 4096\n".to_owned();
    let server = NatsServer::start_with(Settings { jetstream: false, extra, ..Settings::default() }).await?;
    let options = async_nats::ConnectOptions::with_user_and_password("mail".to_owned(), "room".to_owned());
    let client = server.client_with(options).await?;
    assert_eq!(client.server_info().max_payload, 4096);
    assert!(server.client().await.is_err(), "no credentials, yet let in");

    let refused = NatsServer::start_with(Settings { extra: "max_payload: what".to_owned(), ..Settings::default() });
    let refused = refused.await.expect_err("started with nonsense").to_string();
    assert!(refused.contains("nats-server.conf:5:"), "{refused}");
    Ok(())
}

/// A stream of more than one batch is read whole and in order.
#[tokio::test]
async fn long_streams_are_read_whole() -> Result<()> {
    let server = NatsServer::start().await?;
    let jetstream = server.jetstream().await?;
    let config = async_nats::jetstream::stream::Config { name: "DEAD".to_owned(), ..Default::default() };
    jetstream.create_stream(config).await?;
    assert_eq!(streams::dead_letters(&jetstream).await?.len(), 0);
    let mut acks = Vec::new();
    for number in 1..=1234 {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Mailroom-Id", format!("MAIL:1700000000:triage:{number}"));
        acks.push(jetstream.publish_with_headers("DEAD", headers, "{}".into()).await?);
    }
    for ack in acks {
        ack.await?;
    }
    let dead = streams::dead_letters(&jetstream).await?;
    let sequences = dead.iter().map(Stored::mail_sequence).collect::<Result<Vec<_>>>()?;
    assert_eq!(sequences, (1..=1234).collect::<Vec<u64>>());
    let stream = jetstream.get_stream("DEAD").await?;
    assert_eq!(stream.cached_info().state.consumer_count, 0, "the reading consumer is left");
    Ok(())
}

/// A command that hangs is ended at its deadline; one that ends gives its output and exit code.
#[tokio::test]
async fn commands_are_bounded() -> Result<()> {
    let output = command::run("sh", ["-c", "cat; echo err >&2; exit 75"], b"in", SOON).await?;
    assert_eq!((output.code(), &*output.stdout, &*output.stderr), (Some(75), "in", "err\n"));
    assert!(output.success().is_err());
    let hung = command::run("sleep", ["600"], b"", Duration::from_millis(100)).await;
    assert!(hung.expect_err("it ended").to_string().contains("not finished"));
    Ok(())
}

/// Lines of a process can be waited for, and a process that ends or stays silent does not hang the test.
#[tokio::test]
async fn lines_are_waited_for() -> Result<()> {
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", "echo first; echo second >&2; trap 'echo caught; exit 3' TERM; while :; do sleep 0.01; done"]);
    let mut process = Process::spawn("shell", shell)?;
    assert_eq!(process.wait_for_line(SOON, |line| line.starts_with("sec")).await?, "second");
    assert_eq!(process.wait_for_line(SOON, |line| line.starts_with("fir")).await?, "first");
    let silent = process.wait_for_line(Duration::from_millis(50), |line| line == "caught").await;
    assert!(silent.expect_err("nothing to catch").to_string().contains("did not print"));
    // The trap is set after the lines above are printed: send until it is caught.
    let caught = async || {
        process.signal(Signal::TERM)?;
        process.wait_for_line(Duration::from_millis(200), |line| line == "caught").await
    };
    eventually(SOON, "the shell catches a signal", caught, |_| true).await?;
    assert_eq!(process.wait(SOON).await?.code(), Some(3));
    let ended = process.wait_for_line(SOON, |line| line == "never").await;
    assert!(ended.expect_err("a line from nowhere").to_string().contains("ended without"));
    assert!(process.signal(Signal::TERM).is_err(), "signalled a process that is gone");
    Ok(())
}

/// What is never seen is reported with what was seen last.
#[tokio::test]
async fn waiting_in_vain_names_the_last_value() {
    let mut asked = 0;
    let probe = async || {
        asked += 1;
        Ok(asked)
    };
    let err = eventually(Duration::from_millis(100), "the impossible", probe, |_| false).await;
    let err = err.expect_err("the impossible happened").to_string();
    assert!(err.contains("the impossible: not within 100ms; last seen: "), "{err}");
}

/// Responses of either framing are read whole, and one that is cut short is refused.
#[tokio::test]
async fn responses_of_either_framing_are_read() -> Result<()> {
    let cases = [
        ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", Some("hi")),
        ("HTTP/1.1 200 OK\r\n\r\nhi", Some("hi")),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n3;x=y\r\n yo\r\n0\r\n\r\n", Some("hi yo")),
        ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhi", None),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhi", None),
        ("nonsense\r\n\r\n", None),
    ];
    for (response, body) in cases {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}/metrics", listener.local_addr()?);
        let serve = async {
            let (mut connection, _) = listener.accept().await?;
            let mut request = [0; 1024];
            let read = connection.read(&mut request).await?;
            ensure!(request[..read].starts_with(b"GET /metrics HTTP/1.1\r\n"), "another request");
            connection.write_all(response.as_bytes()).await?;
            connection.shutdown().await?;
            Ok(())
        };
        let (served, got) = tokio::join!(serve, http::get(&url));
        served?;
        assert_eq!(got.ok().map(|got| got.body).as_deref(), body, "{response:?}");
    }
    Ok(())
}

/// Metrics are found by name and labels, and summed over the labels not asked for.
#[test]
fn metrics_are_read() -> Result<()> {
    let text = "# TYPE m counter\nm{outcome=\"verdict\",queue=\"a,\\\"}b\"} 3\nm{outcome=\"dead\"} 1e0 1700000000000\n\
                t_sum{shard=\"0\"} 1.5\nt_count{shard=\"0\"} 2\nt_sum{shard=\"1\"} 0.5\nt_count{shard=\"1\"} 2\nup 1\n";
    let metrics = Metrics::parse(text)?;
    assert_eq!(metrics.get("m", &[]), Some(4.0));
    assert_eq!(metrics.get("m", &[("queue", "a,\"}b")]), Some(3.0));
    assert_eq!(metrics.get("m", &[("outcome", "none")]), None);
    assert_eq!(metrics.mean("t"), Some(0.5));
    assert_eq!(metrics.mean("up"), None);
    assert_eq!(metrics.names(), ["m", "t_count", "t_sum", "up"]);
    Metrics::parse("what").expect_err("no sample").to_string();
    Ok(())
}

/// The books tell which mails are lost, doubled or unknown.
#[tokio::test]
async fn books_that_do_not_balance_are_told_of() -> Result<()> {
    let server = NatsServer::start().await?;
    let jetstream = server.jetstream().await?;
    for (name, subject) in [(streams::MAIL, "mail"), (streams::VERDICTS, "verdict"), (streams::DEAD, "dead")] {
        let subjects = vec![subject.to_owned()];
        let config = async_nats::jetstream::stream::Config { name: name.to_owned(), subjects, ..Default::default() };
        jetstream.create_stream(config).await?;
    }
    let end = async |subject: &'static str, sequence: u64| -> Result<()> {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Mailroom-Id", format!("MAIL:1700000000:triage:{sequence}"));
        headers.insert("Mailroom-Reason", "rejected");
        jetstream.publish_with_headers(subject, headers, "{}".into()).await?.await?;
        Ok(())
    };
    for mail in ["one", "two", "three"] {
        jetstream.publish("mail", mail.into()).await?.await?;
    }
    for (subject, sequence) in [("verdict", 1), ("dead", 2)] {
        end(subject, sequence).await?;
    }
    let lost = Books::of(&jetstream).await?;
    let told = lost.balance().expect_err("a mail is lost").to_string();
    ensure!(lost.lost == [3] && told.contains("1 are lost") && told.contains("mail 3: three"), "{told}");
    end("verdict", 3).await?;
    let balanced = Books::of(&jetstream).await?;
    balanced.balance()?;
    assert_eq!((balanced.mails, balanced.verdicts, balanced.dead()), (3, 2, 1));
    end("dead", 1).await?;
    end("verdict", 7).await?;
    let wrong = Books::of(&jetstream).await?;
    assert_eq!((&wrong.doubled[..], &wrong.unknown[..]), (&[1][..], &[7][..]));
    let told = wrong.balance().expect_err("one is doubled and one unknown").to_string();
    ensure!(told.contains("1 have more than one end; 1 are unknown") && told.contains("reason rejected"), "{told}");
    Ok(())
}

/// A network that is cut lets nothing through until it is healed, a slow one takes its time, and connections are reset.
#[tokio::test]
async fn networks_are_cut_slow_and_unsteady() -> Result<()> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let proxy = Proxy::to(&format!("nats://{}", listener.local_addr()?)).await?;
    let address = proxy.url().trim_start_matches("nats://");
    let mut client = tokio::net::TcpStream::connect(address).await?;
    let (mut server, _) = listener.accept().await?;
    let mut byte = [0];
    for (delay, at_least) in [(Duration::ZERO, Duration::ZERO), (Duration::from_millis(40), Duration::from_millis(80))]
    {
        proxy.slow(delay);
        let begun = std::time::Instant::now();
        client.write_all(b"1").await?;
        server.read_exact(&mut byte).await?;
        server.write_all(b"2").await?;
        client.read_exact(&mut byte).await?;
        ensure!(begun.elapsed() >= at_least, "there and back in {:?}", begun.elapsed());
    }
    proxy.heal();
    proxy.cut();
    client.write_all(b"3").await?;
    let waited = tokio::time::timeout(Duration::from_millis(100), server.read(&mut byte)).await;
    ensure!(waited.is_err(), "something came through: {byte:?}");
    proxy.heal();
    server.read_exact(&mut byte).await?;
    ensure!(&byte == b"3", "what was under way is {byte:?}");
    proxy.reset();
    for side in [&mut client, &mut server] {
        let ended = side.read(&mut byte).await.expect_err("still connected");
        assert_eq!(ended.kind(), std::io::ErrorKind::ConnectionReset);
    }
    Ok(())
}
