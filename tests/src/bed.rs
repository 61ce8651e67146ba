//! What most tests stand on: a provisioned server and a JetStream context, and mail for the guest `actor`.

use crate::books::Books;
use crate::prelude::*;
use async_nats::HeaderMap;
use async_nats::jetstream::Context;
use async_nats::jetstream::consumer::{PullConsumer, pull};

/// Time enough for anything that happens soon, on a busy machine.
pub const SOON: Duration = Duration::from_secs(30);

/// A server with the streams and the consumer that `host provision` makes.
#[derive(Debug)]
pub struct Bed {
    /// The server.
    pub server: NatsServer,
    /// A connection to it.
    pub jetstream: Context,
    /// How long it waits for what has to come, [`SOON`] unless said otherwise.
    pub patience: Duration,
}

impl Bed {
    /// A server of its own on the loopback interface.
    ///
    /// # Errors
    /// When nats-server or the host is missing or fails.
    pub async fn new() -> Result<Self> {
        Self::provisioned(&[]).await
    }

    /// With further arguments for `host provision`.
    ///
    /// # Errors
    /// As [`Bed::new`].
    pub async fn provisioned(args: &[&str]) -> Result<Self> {
        Self::on(NatsServer::start().await?, args).await
    }

    /// On a server that runs already, without credentials.
    ///
    /// # Errors
    /// When the server cannot be provisioned.
    pub async fn on(server: NatsServer, args: &[&str]) -> Result<Self> {
        let jetstream = server.jetstream().await?;
        let bed = Self { server, jetstream, patience: SOON };
        bed.provision(args).await?;
        Ok(bed)
    }

    /// Makes what is missing on the server, with further arguments for `host provision`.
    ///
    /// # Errors
    /// When the server refuses.
    pub async fn provision(&self, args: &[&str]) -> Result<()> {
        let fixed = ["provision", "--server", self.server.url()];
        command::host(fixed.iter().chain(args)).await?.success()?;
        Ok(())
    }

    /// A ready host that runs the guest `actor`.
    ///
    /// # Errors
    /// When it does not become ready.
    pub async fn actor(&self, args: &[&str]) -> Result<Host> {
        let host = Host::on(self.server.url()).component(tools::component("actor")?).args(args).start().await?;
        host.until_ready(SOON).await?;
        Ok(host)
    }

    /// Publishes mails that tell the actor what to do; returns the sequence of the last.
    ///
    /// # Errors
    /// When one is not stored.
    pub async fn tell<S: AsRef<str>>(&self, commands: impl IntoIterator<Item = S>) -> Result<u64> {
        let mut last = None;
        for command in commands {
            last = Some(self.jetstream.publish("mail.test", command.as_ref().to_owned().into()).await?);
        }
        Ok(last.context("at least one command")?.await?.sequence)
    }

    /// Publishes one such mail with headers.
    ///
    /// # Errors
    /// When it is not stored.
    pub async fn tell_with(&self, headers: HeaderMap, command: &str) -> Result<u64> {
        let publish = self.jetstream.publish_with_headers("mail.test", headers, command.to_owned().into());
        Ok(publish.await?.await?.sequence)
    }

    /// Waits for that many verdicts and returns them.
    ///
    /// # Errors
    /// When there are fewer after [`Bed::patience`].
    pub async fn verdicts(&self, count: usize) -> Result<Vec<Stored>> {
        self.verdicts_at_least(count as u64).await?;
        streams::verdicts(&self.jetstream).await
    }

    /// Waits for that many verdicts.
    ///
    /// # Errors
    /// When there are fewer after [`Bed::patience`].
    pub async fn verdicts_at_least(&self, count: u64) -> Result<()> {
        let look = async || streams::count(&self.jetstream, streams::VERDICTS).await;
        eventually(self.patience, &format!("{count} verdicts"), look, |found| *found >= count).await.map(drop)
    }

    /// Waits for that many dead letters and returns them.
    ///
    /// # Errors
    /// When there are fewer after [`Bed::patience`].
    pub async fn dead_letters(&self, count: usize) -> Result<Vec<Stored>> {
        let what = format!("{count} dead letters");
        let look = async || Ok(streams::count(&self.jetstream, streams::DEAD).await? as usize);
        eventually(self.patience, &what, look, |found| *found >= count).await?;
        streams::dead_letters(&self.jetstream).await
    }

    /// Waits for that many verdicts and dead letters together.
    ///
    /// # Errors
    /// When there are fewer after [`Bed::patience`].
    pub async fn outcomes(&self, count: u64) -> Result<()> {
        let look = async || streams::outcomes(&self.jetstream).await;
        eventually(self.patience, &format!("{count} verdicts and dead letters"), look, |found| *found >= count)
            .await
            .map(drop)
    }

    /// The consumer that hosts share.
    ///
    /// # Errors
    /// When there is none.
    pub async fn consumer(&self) -> Result<PullConsumer> {
        let stream = self.jetstream.get_stream(streams::MAIL).await?;
        let consumer = stream.get_consumer::<pull::Config>("triage").await;
        consumer.map_err(|err| anyhow::anyhow!("consumer triage: {err}"))
    }

    /// Waits until no message is waiting or in anyone's hands.
    ///
    /// # Errors
    /// When one still is after [`Bed::patience`].
    pub async fn settled(&self) -> Result<()> {
        self.settled_within(self.patience).await
    }

    /// The same with more time, or less.
    ///
    /// # Errors
    /// When one still is after `deadline`.
    pub async fn settled_within(&self, deadline: Duration) -> Result<()> {
        let look = async || {
            let mut consumer = self.consumer().await?;
            let info = consumer.info().await?;
            Ok((info.num_pending, info.num_ack_pending))
        };
        eventually(deadline, "nothing pending", look, |pending| *pending == (0, 0)).await.map(drop)
    }

    /// Waits until all is settled; then every mail of the stream has ended as exactly one verdict or dead letter.
    ///
    /// # Errors
    /// When it is not so, when there are not so many mails, or when something is still pending after [`Bed::patience`].
    pub async fn books_balance(&self, mails: u64) -> Result<Books> {
        self.outcomes(mails).await?;
        self.settled().await?;
        // In a cluster a server that has just come back gives no answers, or those of the time before it stood still.
        let look = async || Books::of(&self.jetstream).await;
        let books = eventually(self.patience, "no mail is lost or unknown", look, |books| {
            books.lost.is_empty() && books.unknown.is_empty()
        })
        .await?;
        books.balance()?;
        ensure!(books.mails == mails, "{} of {mails} mails are in the stream", books.mails);
        Ok(books)
    }

    /// Every mail of the stream has exactly one verdict, and there is nothing else.
    ///
    /// # Errors
    /// When one has none or two, or there is a dead letter.
    pub async fn one_verdict_each(&self, mails: u64) -> Result<()> {
        let books = self.books_balance(mails).await?;
        ensure!(books.dead() == 0, "there are dead letters: {:?}", books.dead_letters);
        Ok(())
    }
}
