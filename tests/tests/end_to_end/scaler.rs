//! `host scaler`, called as KEDA calls it.

use async_nats::jetstream::consumer::pull;
use async_nats::jetstream::{Context, Message};
use external_scaler::external_scaler_client::ExternalScalerClient;
use external_scaler::{GetMetricsRequest, IsActiveResponse, ScaledObjectRef};
use futures::TryStreamExt as _;
use std::path::Path;
use std::time::Instant;
use tests::Scaler;
use tests::bed::{Bed, SOON};
use tests::prelude::*;
use tests::scaler::Client;
use tokio::time::timeout;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Status, Streaming};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

/// What KEDA sends of a ScaledObject with this trigger.
fn object(name: &str, metadata: &[(&str, &str)]) -> ScaledObjectRef {
    let address = ("scalerAddress", "mailroom-scaler.mail:9466");
    let metadata = metadata.iter().chain([&address]).map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    ScaledObjectRef { name: name.to_owned(), namespace: "mail".to_owned(), scaler_metadata: metadata.collect() }
}

fn triage(metadata: &[(&str, &str)]) -> ScaledObjectRef {
    object("triage", &[&[("stream", "MAIL"), ("consumer", "triage")][..], metadata].concat())
}

/// The next thing that KEDA is told, which must come within `deadline`.
async fn told(stream: &mut Streaming<IsActiveResponse>, deadline: Duration) -> Result<bool> {
    let message = timeout(deadline, stream.message()).await.context("nothing was told in time")??;
    Ok(message.context("the stream ended")?.result)
}

/// The value of the only metric.
async fn metric(client: &mut Client, object: &ScaledObjectRef) -> Result<f64> {
    let specs = client.get_metric_spec(object.clone()).await?.into_inner().metric_specs;
    let metric_name = specs.first().context("a metric")?.metric_name.clone();
    let request = GetMetricsRequest { scaled_object_ref: Some(object.clone()), metric_name };
    let values = client.get_metrics(request).await?.into_inner().metric_values;
    ensure!(values.len() == 1, "{values:?}");
    Ok(values[0].metric_value_float)
}

/// The watchers that the server has of the stream now.
async fn watchers(jetstream: &Context, stream: &str) -> Result<Vec<String>> {
    let stream = jetstream.get_stream(stream).await?;
    let consumers: Vec<_> = stream.consumers().try_collect().await?;
    let watchers = consumers.into_iter().filter(|info| info.config.durable_name.is_none());
    Ok(watchers.map(|info| info.name).collect())
}

async fn until_watched(jetstream: &Context, count: usize) -> Result<()> {
    let look = async || watchers(jetstream, streams::MAIL).await;
    eventually(SOON, &format!("{count} watchers"), look, |found| found.len() == count).await.map(drop)
}

/// Takes so many messages at most from the durable consumer.
async fn take(bed: &Bed, most: usize) -> Result<Vec<Message>> {
    let messages = bed.consumer().await?.fetch().max_messages(most).messages().await?;
    messages.try_collect().await.map_err(anyhow::Error::from_boxed)
}

/// Acknowledges them; returns how many there were.
async fn acknowledge(messages: Vec<Message>) -> Result<usize> {
    let count = messages.len();
    for message in messages {
        message.double_ack().await.map_err(anyhow::Error::from_boxed)?;
    }
    Ok(count)
}

/// Takes and acknowledges everything; returns how many there were.
async fn drain(bed: &Bed) -> Result<usize> {
    acknowledge(take(bed, 1000).await?).await
}

/// From zero and back, again and again: KEDA is told as soon as the first message is there, and that all is done when
/// nothing waits and nothing is in flight. The watcher exists in between only, and takes no message from the hosts.
#[tokio::test]
async fn activation_is_pushed_with_the_first_message() -> Result<()> {
    let bed = Bed::new().await?;
    let scaler = Scaler::ready(bed.server.url()).await?;
    let mut client = scaler.client().await?;
    let mut stream = client.stream_is_active(triage(&[])).await?.into_inner();
    ensure!(!told(&mut stream, SOON).await?, "active without messages");
    let mut times = Vec::new();
    for _ in 0..5 {
        until_watched(&bed.jetstream, 1).await?;
        let published = Instant::now();
        bed.tell(["verdict support"]).await?;
        ensure!(told(&mut stream, Duration::from_secs(5)).await?, "still inactive");
        times.push(published.elapsed());
        until_watched(&bed.jetstream, 0).await?;
        ensure!(drain(&bed).await? == 1, "the durable consumer has not got the message");
        ensure!(!told(&mut stream, SOON).await?, "still active");
    }
    times.sort();
    println!("from publish to activation: median {:?}, longest {:?}", times[2], times[4]);
    let watched = |metrics: &Metrics| metrics.get("mailroom_scaler_watchers", &[]) == Some(1.0);
    let metrics = eventually(SOON, "it watches again", async || scaler.metrics().await, watched).await?;
    for (name, value) in [("activations_total", 5.0), ("streams", 1.0), ("watcher_failures_total", 0.0)] {
        let name = format!("mailroom_scaler_{name}");
        ensure!(metrics.get(&name, &[]) == Some(value), "{name}: {:?}", metrics.get(&name, &[]));
    }
    let calls = [("method", "StreamIsActive"), ("code", "Ok")];
    ensure!(metrics.get("mailroom_scaler_requests_total", &calls) == Some(1.0), "calls are counted");
    Ok(())
}

/// A message in somebody's hands keeps the replicas, and counts as lag.
#[tokio::test]
async fn what_is_in_flight_is_not_done() -> Result<()> {
    let bed = Bed::new().await?;
    let scaler = Scaler::ready(bed.server.url()).await?;
    let mut client = scaler.client().await?;
    let mut stream = client.stream_is_active(triage(&[])).await?.into_inner();
    ensure!(!told(&mut stream, SOON).await?);
    bed.tell(["verdict a", "verdict b", "verdict c"]).await?;
    ensure!(told(&mut stream, SOON).await?);
    let mut held = take(&bed, 3).await?;
    let object = triage(&[("lagThreshold", "2")]);
    ensure!(metric(&mut client, &object).await? == 3.0, "three are in flight");
    let last = held.pop().context("three messages")?;
    acknowledge(held).await?;
    ensure!(metric(&mut client, &object).await? == 1.0, "one is in flight");
    ensure!(client.is_active(object.clone()).await?.into_inner().result, "one is in flight");
    ensure!(timeout(Duration::from_secs(3), stream.message()).await.is_err(), "told that all is done");
    acknowledge(vec![last]).await?;
    ensure!(!told(&mut stream, SOON).await?, "all is done");
    ensure!(metric(&mut client, &object).await? == 0.0, "nothing is left");
    Ok(())
}

/// A few messages may wait for others; once there were enough, the last one is done too.
#[tokio::test]
async fn the_activation_lag_is_passed_once() -> Result<()> {
    let bed = Bed::new().await?;
    let scaler = Scaler::ready(bed.server.url()).await?;
    let mut client = scaler.client().await?;
    let object = triage(&[("activationLagThreshold", "2")]);
    let mut stream = client.stream_is_active(object.clone()).await?.into_inner();
    ensure!(!told(&mut stream, SOON).await?);
    bed.tell(["verdict a", "verdict b"]).await?;
    ensure!(!client.is_active(object.clone()).await?.into_inner().result, "two are not enough");
    ensure!(client.is_active(triage(&[])).await?.into_inner().result, "for another trigger they are");
    bed.tell(["verdict c"]).await?;
    ensure!(told(&mut stream, SOON).await?, "three are");
    acknowledge(take(&bed, 2).await?).await?;
    ensure!(metric(&mut client, &object).await? == 1.0, "one is left");
    ensure!(client.is_active(object.clone()).await?.into_inner().result, "one is left");
    ensure!(drain(&bed).await? == 1);
    ensure!(!told(&mut stream, SOON).await?);
    Ok(())
}

/// Any number of ScaledObjects; those of one consumer share a watcher, and none wakes for another's messages.
#[tokio::test]
async fn scaled_objects_are_apart() -> Result<()> {
    let bed = Bed::new().await?;
    let other = ["--stream", "OTHER", "--consumer", "sorter", "--subjects", "other.>", "--no-bucket"];
    bed.provision(&other).await?;
    let filtered = pull::Config {
        durable_name: Some("filtered".to_owned()),
        filter_subject: "mail.other".to_owned(),
        ..pull::Config::default()
    };
    bed.jetstream.create_consumer_on_stream(filtered, streams::MAIL).await?;
    let scaler = Scaler::ready(bed.server.url()).await?;
    let mut client = scaler.client().await?;
    let sorter = object("sorter", &[("stream", "OTHER"), ("consumer", "sorter")]);
    let filtered = object("filtered", &[("stream", "MAIL"), ("consumer", "filtered")]);
    let mut streams = Vec::new();
    for object in [triage(&[]), triage(&[]), sorter, filtered] {
        let mut stream = scaler.client().await?.stream_is_active(object).await?.into_inner();
        ensure!(!told(&mut stream, SOON).await?);
        streams.push(stream);
    }
    until_watched(&bed.jetstream, 2).await?;
    ensure!(watchers(&bed.jetstream, "OTHER").await?.len() == 1);
    bed.tell(["verdict a"]).await?;
    ensure!(told(&mut streams[0], SOON).await? && told(&mut streams[1], SOON).await?, "both of the consumer");
    bed.jetstream.publish("other.test", "x".into()).await?.await?;
    ensure!(told(&mut streams[2], SOON).await?, "the other stream's");
    ensure!(timeout(Duration::from_secs(1), streams[3].message()).await.is_err(), "woken by another's messages");
    bed.jetstream.publish("mail.other", "x".into()).await?.await?;
    ensure!(told(&mut streams[3], SOON).await?, "the filtered consumer's");
    ensure!(metric(&mut client, &triage(&[])).await? == 2.0);

    // Nobody listens, nobody watches.
    drain(&bed).await?;
    drop(streams);
    until_watched(&bed.jetstream, 0).await?;
    let look = async || Ok(scaler.metrics().await?.get("mailroom_scaler_streams", &[]));
    eventually(SOON, "no streams", look, |count| *count == Some(0.0)).await?;
    Ok(())
}

/// A consumer that is not there is never "nothing to do" and never a number.
#[tokio::test]
async fn a_missing_consumer_is_an_error() -> Result<()> {
    let bed = Bed::new().await?;
    let scaler = Scaler::ready(bed.server.url()).await?;
    let mut client = scaler.client().await?;
    for (stream, consumer, said) in
        [("MAIL", "other", "no consumer other of stream MAIL"), ("NONE", "triage", "no stream NONE")]
    {
        let object = object("o", &[("stream", stream), ("consumer", consumer)]);
        let metric_name = format!("lag-{}-{consumer}", stream.to_lowercase());
        let metrics = GetMetricsRequest { scaled_object_ref: Some(object.clone()), metric_name };
        for status in [
            client.is_active(object.clone()).await.map(drop),
            client.get_metrics(metrics).await.map(drop),
            client.stream_is_active(object).await.map(drop),
        ] {
            let status = status.err().context("an answer")?;
            ensure!(status.code() == Code::NotFound && status.message().contains(said), "{status:?}");
        }
    }
    // One that goes while it is watched.
    let mut stream = client.stream_is_active(triage(&[])).await?.into_inner();
    ensure!(!told(&mut stream, SOON).await?);
    until_watched(&bed.jetstream, 1).await?;
    bed.jetstream.get_stream(streams::MAIL).await?.delete_consumer("triage").await?;
    bed.tell(["verdict a"]).await?;
    let status = timeout(SOON, stream.message()).await?.err().context("an answer")?;
    ensure!(status.code() == Code::NotFound, "{status:?}");
    Ok(())
}

/// While the server is away there are errors and no numbers; a stream that was open goes on, and what came meanwhile
/// is told of when the server is back, though it has forgotten the watcher.
#[tokio::test]
async fn a_server_that_was_away_is_watched_again() -> Result<()> {
    let mut bed = Bed::new().await?;
    let scaler = Scaler::ready(bed.server.url()).await?;
    let mut client = scaler.client().await?;
    let mut stream = client.stream_is_active(triage(&[])).await?.into_inner();
    ensure!(!told(&mut stream, SOON).await?);
    for _ in 0..2 {
        until_watched(&bed.jetstream, 1).await?;
        bed.server.kill();
        let refused = async || Ok(client.clone().is_active(triage(&[])).await.map_err(|status| status.code()).err());
        eventually(SOON, "an error", refused, |code| *code == Some(Code::Unavailable)).await?;
        let status = metric(&mut client, &triage(&[])).await.err().context("a number")?;
        let code = status.downcast_ref::<Status>().map(Status::code);
        ensure!(code == Some(Code::Unavailable), "{status:?}");
        let opened = client.stream_is_active(triage(&[])).await.err().context("a stream")?;
        ensure!(opened.code() == Code::Unavailable, "{opened:?}");
        scaler.until_ready(503).await?;
        bed.server.restart().await?;
        bed.jetstream = bed.server.jetstream().await?;
        bed.tell(["verdict a"]).await?;
        ensure!(told(&mut stream, SOON).await?, "still inactive");
        ensure!(drain(&bed).await? == 1);
        ensure!(!told(&mut stream, SOON).await?);
        scaler.until_ready(200).await?;
    }
    Ok(())
}

/// A scaler that starts before its server says so, and works when that comes.
#[tokio::test]
async fn a_scaler_waits_for_its_server() -> Result<()> {
    let mut bed = Bed::new().await?;
    bed.server.stop().await?;
    let scaler = Scaler::start(bed.server.url(), &[]).await?;
    let mut client = scaler.client().await?;
    let status = client.is_active(triage(&[])).await.err().context("an answer")?;
    ensure!(status.code() == Code::Unavailable, "{status:?}");
    ensure!(health(&scaler).await? == ServingStatus::NotServing);
    bed.server.restart().await?;
    scaler.until_ready(200).await?;
    ensure!(!client.is_active(triage(&[])).await?.into_inner().result);
    let look = async || health(&scaler).await;
    eventually(SOON, "serving", look, |status| *status == ServingStatus::Serving).await?;
    Ok(())
}

async fn health(scaler: &Scaler) -> Result<ServingStatus> {
    let channel = Endpoint::from_shared(format!("http://{}", scaler.address()))?.connect().await?;
    let request = HealthCheckRequest { service: "externalscaler.ExternalScaler".to_owned() };
    Ok(HealthClient::new(channel).check(request).await?.into_inner().status())
}

/// A trigger that cannot be meant is refused with the key and what to do about it; a metric that nobody named too.
#[tokio::test]
async fn wrong_metadata_is_named() -> Result<()> {
    let bed = Bed::new().await?;
    let scaler = Scaler::ready(bed.server.url()).await?;
    let mut client = scaler.client().await?;
    for (object, said) in [
        (object("o", &[("stream", "MAIL")]), "mail/o: consumer is missing; add `consumer: triage`"),
        (triage(&[("lagTreshold", "5")]), "mail/triage: lagTreshold: no key of this trigger; remove it"),
        (triage(&[("lagThreshold", "ten")]), "lagThreshold \"ten\": not a whole number"),
    ] {
        for status in [
            client.is_active(object.clone()).await.map(drop),
            client.stream_is_active(object.clone()).await.map(drop),
            client.get_metric_spec(object).await.map(drop),
        ] {
            let status = status.err().context("an answer")?;
            ensure!(status.code() == Code::InvalidArgument && status.message().contains(said), "{status:?}");
        }
    }
    let request = GetMetricsRequest { scaled_object_ref: Some(triage(&[])), metric_name: "s0-lag".to_owned() };
    let status = client.get_metrics(request).await.err().context("an answer")?;
    ensure!(status.code() == Code::InvalidArgument && status.message().contains("lag-mail-triage"), "{status:?}");
    Ok(())
}

/// By time: before anything is known messages are counted; when hosts have shown how fast they are, as many replicas
/// are asked for as are done in time.
#[tokio::test]
async fn replicas_follow_the_hosts_speed() -> Result<()> {
    let bed = Bed::new().await?;
    let scaler = Scaler::ready(bed.server.url()).await?;
    let mut client = scaler.client().await?;
    let object = triage(&[("targetDrainSeconds", "5"), ("lagThreshold", "10"), ("maxInFlight", "8")]);
    let spec = client.get_metric_spec(object.clone()).await?.into_inner().metric_specs;
    ensure!(spec[0].target_size_float == 1.0, "{spec:?}");
    bed.tell((0..200).map(|_| "sleep 100")).await?;
    ensure!(metric(&mut client, &object).await? == 20.0, "200 messages, 10 for each");
    let host = bed.actor(&["--shards", "1", "--max-in-flight", "8"]).await?;
    // 8 places, 100 ms each: 80 a second, 400 in the time that there is.
    let look = async || metric(&mut client, &object).await;
    eventually(SOON, "fewer replicas", look, |replicas| (0.01..0.6).contains(replicas)).await?;
    drop(host);
    Ok(())
}

/// On a work queue there can be no second consumer: the scaler says so and asks every second.
#[tokio::test]
async fn a_work_queue_is_asked_instead_of_watched() -> Result<()> {
    use async_nats::jetstream::stream::{Config, RetentionPolicy};
    let server = NatsServer::start().await?;
    let jetstream = server.jetstream().await?;
    let retention = RetentionPolicy::WorkQueue;
    let config = Config { name: "QUEUE".into(), subjects: vec!["queue".into()], retention, ..Config::default() };
    let stream = jetstream.create_stream(config).await?;
    let durable = pull::Config { durable_name: Some("worker".to_owned()), ..pull::Config::default() };
    stream.create_consumer(durable).await?;
    let mut scaler = Scaler::ready(server.url()).await?;
    let object = object("worker", &[("stream", "QUEUE"), ("consumer", "worker")]);
    let mut stream = scaler.client().await?.stream_is_active(object).await?.into_inner();
    ensure!(!told(&mut stream, SOON).await?);
    scaler.process().wait_for_line(SOON, |line| line.contains("no watcher")).await?;
    jetstream.publish("queue", "x".into()).await?.await?;
    ensure!(told(&mut stream, SOON).await?);
    ensure!(scaler.metrics().await?.get("mailroom_scaler_watcher_failures_total", &[]) == Some(1.0));
    Ok(())
}

/// A message that the NATS library cannot read cuts the scaler's connection, and wakes the hosts all the same.
#[tokio::test]
async fn an_unreadable_message_wakes_too() -> Result<()> {
    let bed = Bed::new().await?;
    let scaler = Scaler::ready(bed.server.url()).await?;
    let mut stream = scaler.client().await?.stream_is_active(triage(&[])).await?.into_inner();
    ensure!(!told(&mut stream, SOON).await?);
    until_watched(&bed.jetstream, 1).await?;
    let mut raw = tests::RawClient::connect(bed.server.url()).await?;
    raw.publish(b"mail.test", Some(b"NATS/1.0\r\nA: \xff\r\n\r\n"), b"verdict support").await?;
    raw.flush().await?;
    ensure!(told(&mut stream, SOON).await?);
    Ok(())
}

/// SIGTERM ends open streams in good order, as KEDA likes it, and the process with 0; no watcher is left.
#[tokio::test]
async fn a_stop_ends_streams_in_good_order() -> Result<()> {
    let bed = Bed::new().await?;
    let mut scaler = Scaler::ready(bed.server.url()).await?;
    let mut stream = scaler.client().await?.stream_is_active(triage(&[])).await?.into_inner();
    ensure!(!told(&mut stream, SOON).await?);
    until_watched(&bed.jetstream, 1).await?;
    scaler.process().signal(Signal::TERM)?;
    let end = timeout(SOON, stream.message()).await?;
    ensure!(matches!(end, Ok(None)), "{end:?}");
    drop(stream);
    ensure!(scaler.process().wait(SOON).await?.code() == Some(0));
    ensure!(watchers(&bed.jetstream, streams::MAIL).await?.is_empty(), "a watcher is left");
    Ok(())
}

/// With an authority for clients, only those in whose certificate it has signed; without one, anybody who speaks TLS.
#[tokio::test]
async fn keda_shows_its_certificate() -> Result<()> {
    let bed = Bed::new().await?;
    let folder = tempfile::tempdir()?;
    let files = Certificates::make(folder.path()).await?;
    let mutual = [
        "--grpc-tls-cert",
        &files.server.0,
        "--grpc-tls-key",
        &files.server.1,
        "--grpc-tls-client-ca",
        &files.authority,
    ];
    let scaler = Scaler::start(bed.server.url(), &mutual).await?;
    scaler.until_ready(200).await?;
    let read = |file: &str| std::fs::read_to_string(file).with_context(|| format!("read {file}"));
    let tls = || -> Result<ClientTlsConfig> {
        Ok(ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(read(&files.authority)?))
            .domain_name("localhost"))
    };
    let identity = |(certificate, key): &(String, String)| {
        Ok::<_, anyhow::Error>(Identity::from_pem(read(certificate)?, read(key)?))
    };
    let ask = async |scaler: &Scaler, tls: Option<ClientTlsConfig>| -> Result<bool> {
        let scheme = if tls.is_some() { "https" } else { "http" };
        let mut endpoint = Endpoint::from_shared(format!("{scheme}://{}", scaler.address()))?;
        if let Some(tls) = tls {
            endpoint = endpoint.tls_config(tls)?;
        }
        let mut client = ExternalScalerClient::new(endpoint.connect().await?);
        Ok(client.is_active(triage(&[])).await?.into_inner().result)
    };
    ensure!(!ask(&scaler, Some(tls()?.identity(identity(&files.client)?))).await?, "active without messages");
    ensure!(ask(&scaler, Some(tls()?.identity(identity(&files.stranger)?))).await.is_err(), "a stranger");
    ensure!(ask(&scaler, Some(tls()?)).await.is_err(), "nobody");
    ensure!(ask(&scaler, None).await.is_err(), "plain text");

    let scaler = Scaler::start(bed.server.url(), &mutual[..4]).await?;
    scaler.until_ready(200).await?;
    ensure!(!ask(&scaler, Some(tls()?)).await?, "active without messages");

    let output =
        command::host(["scaler", "--grpc-tls-cert", &files.server.0, "--grpc-tls-key", &files.client.1]).await?;
    ensure!(output.code() == Some(1) && output.stderr.contains("do not fit together"), "{output:?}");
    Ok(())
}

/// An authority, and who has certificates: file and key each. A stranger's is signed by itself.
struct Certificates {
    authority: String,
    server: (String, String),
    client: (String, String),
    stranger: (String, String),
}

impl Certificates {
    async fn make(folder: &Path) -> Result<Self> {
        let file = |name: &str| folder.join(name).display().to_string();
        let pair = |name: &str| (file(&format!("{name}.pem")), file(&format!("{name}.key")));
        let made = Self {
            authority: file("authority.pem"),
            server: pair("server"),
            client: pair("client"),
            stranger: pair("stranger"),
        };
        let authority = pair("authority");
        for ((certificate, key), signed) in
            [(&authority, false), (&made.stranger, false), (&made.server, true), (&made.client, true)]
        {
            let mut args = vec!["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
            args.extend(["-days", "2", "-keyout", key, "-out", certificate, "-addext", "subjectAltName=DNS:localhost"]);
            args.extend(["-subj", if signed { "/CN=localhost" } else { "/CN=Test authority" }]);
            if signed {
                args.extend([
                    "-CA",
                    &authority.0,
                    "-CAkey",
                    &authority.1,
                    "-addext",
                    "basicConstraints=critical,CA:FALSE",
                ]);
            }
            command::run(tools::installed("openssl", "openssl")?, args, b"", SOON).await?.success()?;
        }
        Ok(made)
    }
}

/// Where no watcher can be made, as beside a consumer of a work queue, the lag is looked at every second.
#[tokio::test]
async fn a_work_queue_takes_no_watcher_and_is_looked_at() -> Result<()> {
    let server = NatsServer::start().await?;
    let jetstream = server.jetstream().await?;
    let config = async_nats::jetstream::stream::Config {
        name: streams::MAIL.to_owned(),
        subjects: vec!["mail.>".to_owned()],
        retention: async_nats::jetstream::stream::RetentionPolicy::WorkQueue,
        ..Default::default()
    };
    jetstream.create_stream(config).await?;
    let bed = Bed::on(server, &["--update", "--mail-max-age", "7d"]).await?;
    let scaler = Scaler::ready(bed.server.url()).await?;
    let mut stream = scaler.client().await?.stream_is_active(triage(&[])).await?.into_inner();
    ensure!(!told(&mut stream, SOON).await?, "active without messages");
    let failures = async || Ok(scaler.metrics().await?.get("mailroom_scaler_watcher_failures_total", &[]));
    eventually(SOON, "no watcher", failures, |count| *count == Some(1.0)).await?;
    bed.tell(["verdict support"]).await?;
    ensure!(told(&mut stream, SOON).await?, "still inactive");
    ensure!(drain(&bed).await? == 1, "the durable consumer has not got the message");
    ensure!(!told(&mut stream, SOON).await?, "still active");
    Ok(())
}
