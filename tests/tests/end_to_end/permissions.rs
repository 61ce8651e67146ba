//! What the security page allows each user is enough for its work, and no more.

use async_nats::ConnectOptions;
use async_nats::jetstream::Context;
use external_scaler::ScaledObjectRef;
use tests::bed::SOON;
use tests::page::Page;
use tests::prelude::*;
use tests::{RawClient, Scaler};

/// The page's users, and one who may do everything.
struct Site {
    server: NatsServer,
    jetstream: Context,
}

impl Site {
    /// A server that enforces the page's permissions, provisioned by the user who may.
    async fn new() -> Result<Self> {
        let page = Page::read("docs/security.md")?;
        let block = page.blocks.iter().find(|block| block.tag == "nats").context("a block of permissions")?;
        let users = "users: [\n    { user: admin, password: secret }";
        let extra = block.text.replace('…', "secret").replacen("users: [", users, 1);
        let server = NatsServer::start_with(Settings { extra, ..Settings::default() }).await?;
        let admin = ConnectOptions::with_user_and_password("admin".to_owned(), "secret".to_owned());
        let jetstream = async_nats::jetstream::new(server.client_with(admin).await?);
        let site = Self { server, jetstream };
        for _ in 0..2 {
            site.run("provisioner", &["provision"]).await?;
        }
        Ok(site)
    }

    /// Runs `host` as this user.
    async fn run(&self, user: &str, args: &[&str]) -> Result<Output> {
        command::host(args.iter().copied().chain(self.login(user).iter().map(String::as_str))).await?.success()
    }

    fn login(&self, user: &str) -> [String; 8] {
        let inbox = format!("_INBOX_{user}");
        ["--server", self.server.url(), "--user", user, "--password", "secret", "--inbox-prefix", &inbox]
            .map(str::to_owned)
    }

    async fn host(&self) -> Result<Host> {
        let host = Host::on(self.server.url()).component(tools::component("actor")?);
        let host = host.args(&self.login("host")[2..]).args(["--retry-min", "100ms"]).start().await?;
        host.until_ready(SOON).await?;
        Ok(host)
    }

    async fn raw(&self, user: &str) -> Result<RawClient> {
        RawClient::connect(&self.server.url().replace("://", &format!("://{user}:secret@"))).await
    }

    /// Waits for so many verdicts and dead letters.
    async fn until(&self, verdicts: u64, letters: u64) -> Result<()> {
        let count = async |stream| streams::count(&self.jetstream, stream).await;
        let look = async || Ok((count(streams::VERDICTS).await?, count(streams::DEAD).await?));
        eventually(SOON, "verdicts and dead letters", look, |counts| *counts == (verdicts, letters)).await.map(drop)
    }
}

/// Every user can do its work: hosts look for verdicts of redelivered messages, store dead letters and find unreadable
/// messages; mail is published, verdicts are read, dead letters listed, shown, run again and dropped.
#[tokio::test]
async fn every_user_can_do_its_work() -> Result<()> {
    let site = Site::new().await?;
    let mut host = site.host().await?;
    let folder = tempfile::tempdir()?;
    for (name, mail) in [("1", "verdict support"), ("2", "reject it"), ("3", "fail-until 2")] {
        let file = folder.path().join(name);
        std::fs::write(&file, mail)?;
        site.run("publisher", &["publish", "--format", "mail", &file.display().to_string()]).await?;
    }
    // One that has to be looked for in the stream.
    let mut raw = site.raw("publisher").await?;
    raw.publish(b"mail.test", Some(b"NATS/1.0\r\nA: \xff\r\n\r\n"), b"verdict support").await?;
    raw.flush().await?;
    site.until(2, 2).await?;
    let keeper = Host::on(site.server.url()).component(tools::component("keeper")?);
    let keeper = keeper.args(&site.login("host")[2..]).args(["--keyvalue", "nats:triage"]).start().await?;
    keeper.until_ready(SOON).await?;
    assert_eq!(host.stop(SOON).await?.code(), Some(0));
    let file = folder.path().join("4");
    std::fs::write(&file, "get a\nset a b\nclaim a c\nincrement n 1\ndelete n\nkeys")?;
    site.run("publisher", &["publish", "--format", "mail", &file.display().to_string()]).await?;
    site.until(3, 2).await?;
    drop(keeper);
    host = site.host().await?;

    ensure!(site.run("reader", &["verdicts", "--json"]).await?.stdout.lines().count() == 3, "three verdicts are read");
    ensure!(site.run("operator", &["dead", "list"]).await?.stdout.contains("rejected"), "no dead letter");
    site.run("operator", &["dead", "show", "1"]).await?;
    site.run("operator", &["dead", "replay", "--all"]).await?;
    site.until(4, 1).await?;
    site.run("operator", &["dead", "drop", "3", "--yes"]).await?;
    site.run("operator", &["dead", "drop", "--all", "--yes"]).await?;
    site.until(4, 0).await?;
    site.run("provisioner", &["provision", "--update", "--dead-max-age", "90d"]).await?;
    assert_eq!(host.stop(SOON).await?.code(), Some(0));
    let refused: Vec<_> = host.process().lines().into_iter().filter(|line| line.contains("NATS refuses")).collect();
    ensure!(refused.is_empty(), "the host was refused something: {refused:?}");
    Ok(())
}

/// The scaler sees the lag, makes its watchers and removes them.
#[tokio::test]
async fn the_scaler_can_do_its_work() -> Result<()> {
    let site = Site::new().await?;
    let login = site.login("scaler");
    let login: Vec<_> = login[2..].iter().map(String::as_str).collect();
    let mut scaler = Scaler::start(site.server.url(), &login).await?;
    scaler.until_ready(200).await?;
    let metadata = [("stream", "MAIL"), ("consumer", "triage")].map(|(key, value)| (key.to_owned(), value.to_owned()));
    let object = ScaledObjectRef { scaler_metadata: metadata.into(), ..ScaledObjectRef::default() };
    let mut stream = scaler.client().await?.stream_is_active(object).await?.into_inner();
    ensure!(!stream.message().await?.context("an answer")?.result, "active without messages");
    let watchers = async || Ok(scaler.metrics().await?.get("mailroom_scaler_watchers", &[]));
    eventually(SOON, "a watcher", watchers, |count| *count == Some(1.0)).await?;
    site.run("publisher", &["publish", &tools::mails()?[0].display().to_string()]).await?;
    let told = tokio::time::timeout(SOON, stream.message()).await??;
    ensure!(told.context("an answer")?.result, "still inactive");
    let consumers = async || Ok(site.jetstream.get_stream(streams::MAIL).await?.cached_info().state.consumer_count);
    eventually(SOON, "no watcher is left", consumers, |count| *count == 1).await?;
    let lines = scaler.process().lines();
    let refused: Vec<_> = lines.iter().filter(|line| line.contains("NATS refuses")).collect();
    ensure!(refused.is_empty(), "the scaler was refused something: {refused:?}");
    Ok(())
}

/// No user can do what is another's, nor listen to another's replies, nor delete or purge what is kept.
#[tokio::test]
async fn no_user_can_do_more() -> Result<()> {
    const DESTRUCTIVE: [&str; 7] = [
        "$JS.API.STREAM.DELETE.MAIL",
        "$JS.API.STREAM.DELETE.DEAD",
        "$JS.API.STREAM.PURGE.MAIL",
        "$JS.API.STREAM.PURGE.VERDICTS",
        "$JS.API.STREAM.MSG.DELETE.MAIL",
        "$JS.API.STREAM.MSG.DELETE.VERDICTS",
        "$JS.API.CONSUMER.DELETE.MAIL.triage",
    ];
    const MAKING: [&str; 4] = [
        "$JS.API.STREAM.CREATE.MINE",
        "$JS.API.STREAM.UPDATE.MAIL",
        "$JS.API.CONSUMER.CREATE.MAIL",
        "$JS.API.CONSUMER.DURABLE.CREATE.MAIL.mine",
    ];
    const WORK: [&str; 5] = [
        "verdict.support.x",
        "dead.MAIL.triage.x",
        "parked.scheduled.MAIL.triage.x",
        "parked.held.MAIL.triage.x",
        "$JS.ACK.MAIL.triage.1.1.1.1.1",
    ];
    const READING: [&str; 3] =
        ["$JS.API.STREAM.MSG.GET.MAIL", "$JS.API.CONSUMER.MSG.NEXT.MAIL.triage", "$JS.API.CONSUMER.CREATE.MAIL.mine"];
    let own: [(&str, &[&[&str]]); 6] = [
        (
            "host",
            &[
                &DESTRUCTIVE,
                &MAKING,
                &["mail.test", "replay.MAIL.other.x", "parked.held.MAIL.other.x", "$JS.API.STREAM.MSG.GET.DEAD"],
                &["$JS.API.CONSUMER.MSG.NEXT.MAIL.other", "$JS.ACK.MAIL.other.1.1.1.1.1"],
                &["$JS.API.CONSUMER.CREATE.DEAD", "$JS.API.CONSUMER.CREATE.VERDICTS", "$KV.other.key"],
            ],
        ),
        ("publisher", &[&DESTRUCTIVE, &MAKING, &WORK, &READING, &["replay.MAIL.triage.x", "$JS.API.INFO"]]),
        ("reader", &[&DESTRUCTIVE, &MAKING, &WORK, &READING, &["mail.test", "replay.MAIL.triage.x"]]),
        ("operator", &[&DESTRUCTIVE, &MAKING, &WORK, &READING, &["mail.test", "replay.MAIL.other.x"]]),
        ("scaler", &[&DESTRUCTIVE, &MAKING[..2], &MAKING[3..], &WORK, &READING, &["mail.test", "replay.MAIL.other.x"]]),
        ("provisioner", &[&DESTRUCTIVE, &WORK, &READING[..2], &["mail.test", "replay.MAIL.triage.x"]]),
    ];
    let site = Site::new().await?;
    site.run("publisher", &["publish", &tools::mails()?[0].display().to_string()]).await?;
    for (user, subjects) in own {
        for subject in subjects.iter().copied().flatten() {
            let mut raw = site.raw(user).await?;
            raw.publish(subject.as_bytes(), None, b"{}").await?;
            let refused = raw.flush().await;
            let words = ["Permissions Violation", subject];
            let said = refused.err().map(|err| err.to_string()).unwrap_or_default();
            ensure!(words.iter().all(|word| said.contains(word)), "{user} publishes to {subject}: {said:?}");
        }
        for subject in ["mail.>", "verdict.>", "dead.>", ">", "_INBOX.>", "_INBOX_admin.>", "$JS.API.>", "$JS.EVENT.>"]
        {
            let mut raw = site.raw(user).await?;
            raw.subscribe(subject).await?;
            let said = raw.flush().await.err().map(|err| err.to_string()).unwrap_or_default();
            ensure!(said.contains("Permissions Violation"), "{user} listens to {subject}: {said:?}");
        }
    }
    assert_eq!(streams::count(&site.jetstream, streams::MAIL).await?, 1);
    Ok(())
}

/// What the page says that permissions do not stop: answers go where the question says. On the subjects of replays, what
/// comes so does no harm.
#[tokio::test]
async fn an_answer_on_a_subject_of_replays_is_a_dead_letter() -> Result<()> {
    let site = Site::new().await?;
    let _host = site.host().await?;
    let mut raw = site.raw("host").await?;
    // The second word is where the answer goes.
    raw.publish(b"$JS.API.STREAM.INFO.MAIL replay.MAIL.triage.x", None, b"").await?;
    raw.flush().await?;
    site.until(0, 1).await?;
    let letters = streams::dead_letters(&site.jetstream).await?;
    assert_eq!(letters[0].header("Mailroom-Reason"), Some("replay"));
    Ok(())
}
