//! What most people would write first: the host's work by the usual means, to be measured against.
//!
//! A task on a runtime with a thread for each core takes every message, makes an instance with WASI in a pool with
//! wasmtime's default settings, publishes the verdict, awaits its PubAck and acknowledges. There is no deadline, no
//! limit on memory, no dead letter.
//!
//! With `--native` the triage is a native function and no task is made for a message; with `--core-publish` nobody
//! waits for the PubAck, and a verdict that is not stored is lost. Both together are as little work as it can be.

use anyhow::{Context as _, Result, bail};
use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::{self, Message};
use async_nats::{Client, HeaderMap, header};
use futures::StreamExt as _;
use guest::Rules;
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Semaphore;
use wasmtime::component::{Component, Linker, ResourceTable};
use wasmtime::{Config, Engine, InstanceAllocationStrategy, PoolingAllocationConfig, Store};
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};

mod bindings {
    #![allow(missing_docs, clippy::all, reason = "generated from wit/, which carries the documentation")]

    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "triage",
        exports: { default: async },
    });
}

use bindings::TriagePre;
use bindings::mailroom::triage::types;

/// Most messages in work.
const IN_FLIGHT: u32 = 512;

/// Core instances and tables that an ordinary component is made of, and more.
const PARTS: u32 = 8;

#[tokio::main]
async fn main() -> Result<()> {
    let (mut server, mut consumer, mut component) = (None, None, None);
    let (mut native, mut core_publish) = (false, false);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match &*arg {
            "--server" => server = args.next(),
            "--consumer" => consumer = args.next(),
            "--component" => component = args.next(),
            "--native" => native = true,
            "--core-publish" => core_publish = true,
            _ => bail!("{arg}: no such option"),
        }
    }
    let handler = match component {
        Some(file) => Handler::Component(Guest::load(&file)?),
        None if native => Handler::Native(Box::new(Rules::defaults())),
        None => bail!("give --component FILE or --native"),
    };
    let client = async_nats::connect(server.context("give --server URL")?).await.context("connect to NATS")?;
    let stream = jetstream::new(client.clone()).get_stream("MAIL").await.context("find the stream MAIL")?;
    let created = stream.cached_info().created.unix_timestamp();
    let consumer: PullConsumer = match stream.get_consumer(&consumer.context("give --consumer NAME")?).await {
        Ok(consumer) => consumer,
        Err(err) => bail!("find the consumer: {err}"),
    };
    let worker = Arc::new(Worker { client, created, handler, core_publish });

    let in_flight = Arc::new(Semaphore::new(IN_FLIGHT as usize));
    let mut messages = consumer.messages().await.context("pull")?;
    let mut terminated = signal(SignalKind::terminate())?;
    println!("ready");
    loop {
        let message = tokio::select! {
            message = messages.next() => message.context("the subscription has ended")??,
            _ = terminated.recv() => break,
        };
        if native {
            worker.settle(message).await?;
            continue;
        }
        let permit = in_flight.clone().acquire_owned().await?;
        let worker = worker.clone();
        tokio::spawn(async move {
            if let Err(err) = worker.settle(message).await {
                eprintln!("a message stays: {err:#}");
            }
            drop(permit);
        });
    }
    drop(in_flight.acquire_many(IN_FLIGHT).await?);
    Ok(worker.client.drain().await?)
}

struct Worker {
    client: Client,
    /// When the stream was made, a part of the messages' ids.
    created: i64,
    handler: Handler,
    core_publish: bool,
}

impl Worker {
    async fn settle(&self, message: Message) -> Result<()> {
        let info = message.info().map_err(anyhow::Error::from_boxed)?;
        let id = format!("{}:{}:{}:{}", info.stream, self.created, info.consumer, info.stream_sequence);
        let (queue, verdict) = match &self.handler {
            Handler::Native(rules) => {
                let verdict = guest::triage(&message.payload, rules).map_err(anyhow::Error::msg)?;
                let issue = match verdict.issue {
                    guest::Issue::New(id) => json!({ "kind": "new", "id": id }),
                    guest::Issue::Existing(id) => json!({ "kind": "existing", "id": id }),
                };
                let priority = match verdict.priority {
                    guest::Priority::Low => "low",
                    guest::Priority::Normal => "normal",
                    guest::Priority::High => "high",
                    guest::Priority::Urgent => "urgent",
                };
                (verdict.queue.clone(), as_json(priority, issue, &verdict.queue, &verdict.reasons))
            }
            Handler::Component(guest) => {
                let message = types::Message {
                    id: id.clone(),
                    subject: message.subject.to_string(),
                    headers: Vec::new(),
                    time: u64::try_from(info.published.unix_timestamp_nanos() / 1_000_000)?,
                    attempt: u32::try_from(info.delivered)?,
                    data: message.payload.to_vec(),
                };
                let verdict = guest.triage(&message).await?;
                let issue = match verdict.issue {
                    types::Issue::New(id) => json!({ "kind": "new", "id": id }),
                    types::Issue::Existing(id) => json!({ "kind": "existing", "id": id }),
                };
                let priority = match verdict.priority {
                    types::Priority::Low => "low",
                    types::Priority::Normal => "normal",
                    types::Priority::High => "high",
                    types::Priority::Urgent => "urgent",
                };
                let json = as_json(priority, issue, &verdict.queue, &verdict.reasons);
                (verdict.queue, json)
            }
        };
        let subject = format!("verdict.{queue}.{id}");
        let mut headers = HeaderMap::new();
        headers.insert(header::NATS_MESSAGE_ID, id);
        let payload = verdict.to_string().into();
        if self.core_publish {
            self.client.publish_with_headers(subject, headers, payload).await?;
        } else {
            message.context.publish_with_headers(subject, headers, payload).await?.await?;
        }
        message.ack().await.map_err(anyhow::Error::from_boxed)
    }
}

fn as_json(priority: &str, issue: Value, queue: &str, reasons: &[String]) -> Value {
    json!({ "priority": priority, "issue": issue, "queue": queue, "reasons": reasons })
}

enum Handler {
    Native(Box<Rules>),
    Component(Guest),
}

struct Guest {
    engine: Engine,
    pre: TriagePre<State>,
}

struct State {
    table: ResourceTable,
    wasi: WasiCtx,
}

impl WasiView for State {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

impl Guest {
    fn load(file: &str) -> Result<Self> {
        let mut pool = PoolingAllocationConfig::new();
        pool.total_component_instances(IN_FLIGHT)
            .total_core_instances(IN_FLIGHT * PARTS)
            .total_memories(IN_FLIGHT)
            .total_tables(IN_FLIGHT * PARTS)
            .total_stacks(IN_FLIGHT);
        let mut config = Config::new();
        config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
        let engine = Engine::new(&config)?;
        let component = Component::from_file(&engine, file)?;
        let mut linker: Linker<State> = Linker::new(&engine);
        wasmtime_wasi::p2::add_to_linker_async(&mut linker)?;
        let pre = TriagePre::new(linker.instantiate_pre(&component)?)?;
        Ok(Self { engine, pre })
    }

    async fn triage(&self, message: &types::Message) -> Result<types::Verdict> {
        let state = State { table: ResourceTable::new(), wasi: WasiCtx::builder().build() };
        let mut store = Store::new(&self.engine, state);
        let instance = self.pre.instantiate_async(&mut store).await?;
        match instance.mailroom_triage_handler().call_triage(&mut store, message).await? {
            Ok(verdict) => Ok(verdict),
            Err(failure) => bail!("{failure:?}"),
        }
    }
}
