//! Ways to have a message triaged in this process, without NATS: a fresh instance as the host makes it, and what one
//! would do instead.

use anyhow::{Context as _, Result};
use futures::executor::block_on;
use host::handler::{Handler as _, Run};
use host::native::{Message, Verdict};
use host::pool::{Guest, Limits, Pool, Pools};
use host::{Grants, from_bytes};
use std::fs;
use std::hint::black_box;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;
use tests::tools;
use wasmtime::component::{Linker, ResourceTable};
use wasmtime::{Engine, InstanceAllocationStrategy, PoolingAllocationConfig, Store};
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};

mod bindings {
    #![allow(missing_docs, clippy::all, reason = "generated from wit/, which carries the documentation")]

    wasmtime::component::bindgen!({ path: "../../wit", world: "triage", exports: { default: async } });
}

/// Instances that may live at a time in one pool. A thread uses one; hosts have 64 a core.
const SLOTS: u32 = 64;

/// Messages between two looks at the clock; a look takes 0.2 µs.
const BATCH: u32 = 100;

/// The bounds of the host's defaults.
const LIMITS: Limits = Limits {
    slots: Some(SLOTS),
    memory_max_bytes: 64 << 20,
    deadline: Duration::from_secs(1),
    output_max_bytes: 64 << 10,
    host_calls_max: 100_000,
};

/// A way to have a message triaged.
pub struct Contestant {
    /// Names it in files.
    pub key: &'static str,
    /// Names it in tables.
    pub name: &'static str,
    /// Whether the message matters to it.
    pub takes_message: bool,
    prepare: Box<dyn Fn() -> Result<Work> + Send + Sync>,
}

/// What a thread does with each message.
pub type Work = Box<dyn FnMut(&Arc<Message>)>;

impl Contestant {
    /// Makes what one thread needs.
    ///
    /// # Errors
    /// The component does not load.
    pub fn prepare(&self) -> Result<Work> {
        (self.prepare)()
    }

    /// CPU time of the calling thread, user and system, for one message each on `threads` threads that work at the
    /// same time, in µs: the mean of what is done in about `time` of each, after a tenth of it to warm up.
    ///
    /// # Errors
    /// As [`Contestant::prepare`].
    pub fn cpu_us(&self, threads: usize, message: &Arc<Message>, time: Duration) -> Result<f64> {
        let barrier = Barrier::new(threads);
        let means = thread::scope(|scope| {
            let work = || {
                let prepared = self.prepare();
                barrier.wait();
                let mut work = prepared?;
                let mut mean_us = |time| {
                    let (before, mut count) = (cpu_time(), 0);
                    loop {
                        for _ in 0..BATCH {
                            work(message);
                        }
                        count += BATCH;
                        let spent = cpu_time() - before;
                        if spent >= time {
                            return spent.as_secs_f64() * 1e6 / f64::from(count);
                        }
                    }
                };
                mean_us(time / 10);
                barrier.wait();
                anyhow::Ok(mean_us(time))
            };
            let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            threads.into_iter().map(|thread| thread.join().expect("it does not panic")).sum::<Result<f64>>()
        })?;
        Ok(means / threads as f64)
    }
}

fn cpu_time() -> Duration {
    Duration::try_from(rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime)).unwrap_or_default()
}

/// All of them. The first is the native function, the second what the host does.
///
/// # Errors
/// A component is missing or does not load.
pub fn contestants() -> Result<Vec<Contestant>> {
    let lean = tools::component("triage")?;
    let ordinary = tools::component("triage-ordinary")?;
    let ours = pools()?;
    let engine = ours[0].engine().clone();
    let default_pool = [Pool::of(engine_with(InstanceAllocationStrategy::Pooling(default_pool()))?, &LIMITS)?];
    let on_demand = [Pool::of(engine_with(InstanceAllocationStrategy::OnDemand)?, &LIMITS)?];
    // Loaded for itself, so that it gets slots of its own: in those of others there would be their pages to wipe.
    let empty = |key, name, pools: &[Pool]| {
        let guests = Guests::load(pools, &lean)?;
        let prepare = move || -> Result<Work> {
            let guest = guests.next();
            Ok(Box::new(move |_| block_on(guest.try_out()).expect("an instance")))
        };
        anyhow::Ok(Contestant { key, name, takes_message: false, prepare: Box::new(prepare) })
    };
    let reused = Arc::new(Bare::new(&engine, &ordinary)?);
    let bare = Arc::new(Bare::new(&engine, &lean)?);
    Ok(vec![
        Contestant {
            key: "native",
            name: "native function",
            takes_message: true,
            prepare: Box::new(|| {
                let rules = rules()?;
                Ok(Box::new(move |message| drop(black_box(guest::triage(&message.data, &rules)))))
            }),
        },
        fresh("fresh", "fresh instance: the host", Guests::load(&ours, &lean)?),
        Contestant {
            key: "reused",
            name: "the same instance for all",
            takes_message: true,
            prepare: Box::new(move || reused.reuse()),
        },
        fresh("fresh-ordinary", "fresh, ordinary guest", Guests::load(&ours, &ordinary)?),
        fresh("default-pool", "fresh, default pool", Guests::load(&default_pool, &lean)?),
        fresh("on-demand", "fresh, on demand", Guests::load(&on_demand, &lean)?),
        fresh("default-pool-ordinary", "fresh, default pool, ordinary guest", Guests::load(&default_pool, &ordinary)?),
        empty("instance", "instance alone: the host", &ours)?,
        Contestant {
            key: "instance-bare",
            name: "instance alone, nothing but wasmtime",
            takes_message: false,
            prepare: Box::new(move || {
                let bare = bare.clone();
                Ok(Box::new(move |_| drop(bare.instance().expect("an instance"))))
            }),
        },
        empty("instance-default-pool", "instance alone, default pool", &default_pool)?,
        empty("instance-on-demand", "instance alone, on demand", &on_demand)?,
    ])
}

/// The rules of the components: with the same models, which the environment names for both.
fn rules() -> Result<guest::Rules> {
    let mut rules = guest::Rules::from_config([("", ""); 0]).map_err(anyhow::Error::msg)?;
    let model = |variable: &str| match std::env::var_os(variable).filter(|file| !file.is_empty()) {
        Some(file) => {
            fs::read(&file).map(|model| Some(model.leak() as &[u8])).with_context(|| format!("read {file:?}"))
        }
        None => Ok(None),
    };
    if let Some(model) = model("MAILROOM_TEAM_MODEL")? {
        rules = rules.with_team_model(model).map_err(anyhow::Error::msg)?;
    }
    if let Some(model) = model("MAILROOM_PRIORITY_MODEL")? {
        rules = rules.with_priority_model(model).map_err(anyhow::Error::msg)?;
    }
    Ok(rules)
}

/// The native function and what the host does, both with the model that `MAILROOM_BENCH_MODEL` names, which is in the
/// component `triage-learned`.
///
/// # Errors
/// The model or the component is missing or does not load.
pub fn learned() -> Result<Vec<Contestant>> {
    let file = std::env::var_os("MAILROOM_BENCH_MODEL").context("MAILROOM_BENCH_MODEL: run `cargo xtask bench`")?;
    let model: &'static [u8] = fs::read(&file).with_context(|| format!("read {file:?}"))?.leak();
    let guests = Guests::load(&pools()?, &tools::component("triage-learned")?)?;
    Ok(vec![
        Contestant {
            key: "native-learned",
            name: "native function, with a model",
            takes_message: true,
            prepare: Box::new(move || {
                let rules = guest::Rules::defaults().with_team_model(model).map_err(anyhow::Error::msg)?;
                Ok(Box::new(move |message| drop(black_box(guest::triage(&message.data, &rules)))))
            }),
        },
        fresh("fresh-learned", "fresh instance: the host, with a model", guests),
    ])
}

fn fresh(key: &'static str, name: &'static str, guests: Guests) -> Contestant {
    Contestant {
        key,
        name,
        takes_message: true,
        prepare: Box::new(move || {
            let guest = guests.next();
            Ok(Box::new(move |message| drop(black_box(verdict(block_on(guest.triage(message.clone())))))))
        }),
    }
}

/// A message with this mail.
pub fn message(mail: Vec<u8>) -> Arc<Message> {
    Arc::new(Message {
        id: "MAIL:1790230470:triage:100".to_owned(),
        subject: "mail.bench".to_owned(),
        headers: Vec::new(),
        time: 1_790_230_470_084,
        attempt: 1,
        data: mail,
    })
}

fn verdict(run: Run) -> Verdict {
    run.outcome.expect("a verdict")
}

/// The host's pools, one for each core.
fn pools() -> Result<Vec<Pool>> {
    let cores = u32::try_from(thread::available_parallelism()?.get())?;
    let pools = Pools::new(&Limits { slots: Some(SLOTS * cores), ..LIMITS }, cores)?;
    (0..cores).map(|number| pools.of_shard(number)).collect()
}

/// A component in pools, of which threads take one each as far as there are so many.
#[derive(Clone)]
struct Guests(Arc<(Vec<Arc<Guest>>, AtomicUsize)>);

impl Guests {
    fn load(pools: &[Pool], path: &Path) -> Result<Self> {
        let loaded = Arc::new(from_bytes(pools[0].engine(), path, &fs::read(path)?)?);
        let guest = |pool: &Pool| Guest::new(pool.clone(), loaded.clone(), &Grants::default()).map(Arc::new);
        let guests = pools.iter().map(guest).collect::<Result<_>>()?;
        Ok(Self(Arc::new((guests, AtomicUsize::default()))))
    }

    fn next(&self) -> Arc<Guest> {
        let (guests, taken) = &*self.0;
        guests[taken.fetch_add(1, Ordering::Relaxed) % guests.len()].clone()
    }
}

/// The host's engine but for where instances live.
fn engine_with(strategy: InstanceAllocationStrategy) -> Result<Engine> {
    let mut config = host::pool::config();
    config.allocation_strategy(strategy);
    Ok(Engine::new(&config)?)
}

/// As it comes, but for room for the components.
fn default_pool() -> PoolingAllocationConfig {
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(SLOTS).total_core_instances(8 * SLOTS).total_memories(SLOTS).total_tables(4 * SLOTS);
    pool.max_memory_size(LIMITS.memory_max_bytes);
    pool
}

/// A component under wasmtime and nothing else: no deadline, no limit on memory, no account of what it does.
struct Bare {
    engine: Engine,
    pre: bindings::TriagePre<State>,
}

#[derive(Default)]
struct State {
    wasi: Option<(WasiCtx, ResourceTable)>,
}

impl Bare {
    fn new(engine: &Engine, path: &Path) -> Result<Self> {
        let component = from_bytes(engine, path, &fs::read(path)?)?.component;
        let mut linker = Linker::new(engine);
        wasmtime_wasi::p2::add_to_linker_async(&mut linker)?;
        let pre = bindings::TriagePre::new(linker.instantiate_pre(&component)?)?;
        Ok(Self { engine: engine.clone(), pre })
    }

    fn instance(&self) -> Result<(Store<State>, bindings::Triage)> {
        let mut store = Store::new(&self.engine, State::default());
        store.set_epoch_deadline(u64::MAX / 2);
        let instance = block_on(self.pre.instantiate_async(&mut store))?;
        Ok((store, instance))
    }

    /// One instance for all messages. The component has to be the ordinary one, whose allocator frees.
    fn reuse(&self) -> Result<Work> {
        let mut live = self.instance()?;
        Ok(Box::new(move |message| answer(&mut live, message)))
    }
}

fn answer((store, instance): &mut (Store<State>, bindings::Triage), message: &Message) {
    let message = bindings::mailroom::triage::types::Message {
        id: message.id.clone(),
        subject: message.subject.clone(),
        headers: message.headers.clone(),
        time: message.time,
        attempt: message.attempt,
        data: message.data.clone(),
    };
    let answer = block_on(instance.mailroom_triage_handler().call_triage(store, &message));
    drop(black_box(answer.expect("it does not trap").expect("a verdict")));
}

/// Keeps instances of the triage alive, in a pool as a host has it.
pub struct Keeper(Bare);

impl Keeper {
    /// With room for so many.
    ///
    /// # Errors
    /// The component does not load, or there is no room.
    pub fn new(slots: u32) -> Result<Self> {
        let pool = Pools::new(&Limits { slots: Some(slots), ..LIMITS }, 1)?.of_shard(0)?;
        Ok(Self(Bare::new(pool.engine(), &tools::component("triage")?)?))
    }

    /// An instance that has answered `message`, for as long as what is returned is held.
    ///
    /// # Errors
    /// So many live already.
    pub fn answered(&self, message: &Message) -> Result<impl Sized + use<>> {
        let mut live = self.0.instance()?;
        answer(&mut live, message);
        Ok(live)
    }
}

impl WasiView for State {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        let (ctx, table) = self.wasi.get_or_insert_with(|| (WasiCtx::builder().build(), ResourceTable::new()));
        WasiCtxView { ctx, table }
    }
}
