//! The pools of instances: one fresh, bounded instance per message, from wasmtime's pooling allocator.
//!
//! Every shard has a pool of its own. Its allocator takes locks and counts for each instance; two threads on one pool
//! cost each other a tenth of a message's time, more threads more.

use crate::capabilities::{Grants, State, TABLE_MAX_ELEMENTS, link};
use crate::component::Loaded;
use crate::handler::{Failure, Fault, Handler, PoolUse, Run, outcome};
use crate::interface::{self, Message, Verdict};
use crate::room;
use crate::turns::{self, Clock};
use anyhow::{Context, Result, bail, ensure};
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use wasmtime::component::types::ComponentItem;
use wasmtime::component::{ComponentExportIndex, Func, InstancePre, Type, TypedFunc};
use wasmtime::{
    Config, Enabled, Engine, InstanceAllocationStrategy, PoolingAllocationConfig, Store, Trap, UpdateDeadline,
    WasmBacktrace,
};

/// Memory and tables up to this size are wiped in place when an instance ends, which keeps their pages mapped:
/// no system call but one scan and no page fault for the next message. Less where memory is limited.
///
/// What one message has touched is wiped after each that follows in its slot, so more is not better: with 1 MiB, a mail
/// with a large attachment in 150 makes all of them cost two thirds more; with this, next to nothing.
const KEEP_RESIDENT_BYTES: usize = 128 << 10;

/// Slots beside those for messages, in the first pool: one in which a component is tried out that is to replace another,
/// however busy the host is.
const SPARE_SLOTS: u32 = 1;

/// Core instances and tables that one component may consist of. Ordinary toolchains make 3 to 5 of each.
const PARTS_MAX: u32 = 32;

/// The bounds on instances.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Most instances alive at the same time, over all shards. Nothing: 64 a shard, or as many as can keep their memory
    /// within half of the memory limit, but at least one a shard.
    pub slots: Option<u32>,
    /// Most linear memory of one instance, in bytes.
    pub memory_max_bytes: usize,
    /// Most time for one message, from instantiation to answer, waiting included. Kept to a millisecond.
    pub deadline: Duration,
    /// Most bytes that a guest may hand to the host in one call, its answer included.
    pub output_max_bytes: usize,
    /// Most calls of one instance to the host. One that makes more is interrupted within a millisecond of computing.
    pub host_calls_max: u64,
}

pub use crate::engine::config;

/// Most slots that can be asked for.
pub const SLOTS_MAX: u32 = 20_000;

/// Slots of a shard, unless the operator says how many.
const SLOTS_PER_SHARD: u32 = 64;

/// What a slot takes of the address space, in bytes: a memory of 4 GiB with its guard, tables and a stack.
const SLOT_ADDRESS_BYTES: u64 = 17 << 28;

/// Address space for all else, in bytes.
const OTHER_ADDRESS_BYTES: u64 = 2 << 30;

/// Memory mappings of a slot in use, and those of all else.
const SLOT_MAPPINGS: u64 = 5;
const OTHER_MAPPINGS: u64 = 2_000;

/// How much of the memory limit the slots may keep for the next instances: one part in so many.
const KEPT_PART: u64 = 2;

/// Where the instances of all shards live: a pool for each, made when the shard begins.
pub struct Pools {
    limits: Limits,
    shards: u32,
    slots: u32,
    kept_bytes: usize,
    clock: Clock,
}

impl Pools {
    /// Room for as many instances as `limits` say, over all shards. If there is no room for so many, it says so in the log
    /// and makes do with fewer, but at least one a shard.
    ///
    /// # Errors
    /// The system has no thread or no file descriptor left.
    pub fn new(limits: &Limits, shards: u32) -> Result<Arc<Self>> {
        let memory_limit = room::memory_limit();
        let wanted = limits.slots.unwrap_or_else(|| {
            let usual = SLOTS_PER_SHARD.saturating_mul(shards).min(SLOTS_MAX);
            let kept = |limit| limit / KEPT_PART / (2 * KEEP_RESIDENT_BYTES as u64);
            fitting(usual, shards, memory_limit.map(kept))
        });
        let (mut slots, mut why) = (wanted, "");
        for (room, reason) in [
            (
                room::address_space_max().map(|bytes| bytes.saturating_sub(OTHER_ADDRESS_BYTES) / SLOT_ADDRESS_BYTES),
                "each takes 4 GiB of the address space, which is limited (ulimit -v)",
            ),
            (
                room::mappings_max().map(|mappings| mappings.saturating_sub(OTHER_MAPPINGS) / SLOT_MAPPINGS),
                "each takes some of the memory mappings that a process may have (vm.max_map_count)",
            ),
        ] {
            let fit = fitting(slots, shards, room.map(|room| room.saturating_sub(SPARE_SLOTS.into())));
            if fit < slots {
                slots = fit;
                why = reason;
            }
        }
        if slots < wanted {
            tracing::warn!("there is room for {slots} slots instead of {wanted}, and so many are used: {why}");
        }
        let kept_bytes = match memory_limit {
            Some(limit) => {
                let all = u64::from(slots + SPARE_SLOTS);
                (limit / KEPT_PART / 2 / all).min(KEEP_RESIDENT_BYTES as u64) as usize
            }
            None => KEEP_RESIDENT_BYTES,
        };
        Ok(Arc::new(Self { limits: limits.clone(), shards, slots, kept_bytes, clock: Clock::start()? }))
    }

    /// Most instances alive at the same time, over all shards, unless [`Pools::of_shard`] finds room for fewer.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// The pool of the shard with this number. If its slots cannot be mapped, it says so in the log and makes do with half
    /// of them, or half of those, but with one at least.
    ///
    /// # Errors
    /// There is no room for one.
    pub fn of_shard(self: &Arc<Self>, number: u32) -> Result<Pool> {
        let wanted = self.slots / self.shards + u32::from(number < self.slots % self.shards);
        let spare = if number == 0 { SPARE_SLOTS } else { 0 };
        let mut slots = wanted;
        let mut why = None;
        let engine = loop {
            match Engine::new(&self.config(slots + spare)) {
                Ok(engine) => break engine,
                Err(err) if slots > 1 => {
                    slots /= 2;
                    why = Some(anyhow::Error::from(err));
                }
                Err(err) => {
                    return Err(anyhow::Error::from(err)).with_context(|| {
                        format!(
                            "map a pool for shard {number}; each slot takes 4 GiB of the address space, see ulimit -v"
                        )
                    });
                }
            }
        };
        if let Some(why) = why {
            tracing::warn!("there is room for {slots} slots instead of {wanted} in shard {number}: {why:#}");
        }
        self.clock.add(engine.clone());
        Ok(Pool { engine, slots, pools: self.clone() })
    }

    /// The settings of an engine with so many of all slots.
    fn config(&self, slots: u32) -> Config {
        let mut pool = PoolingAllocationConfig::new();
        pool.total_component_instances(slots)
            .total_core_instances(slots.saturating_mul(PARTS_MAX))
            .total_memories(slots)
            .total_tables(slots.saturating_mul(4))
            .total_stacks(slots)
            .max_core_instances_per_component(PARTS_MAX)
            .max_tables_per_component(PARTS_MAX)
            .max_memories_per_component(1)
            .max_memory_size(self.limits.memory_max_bytes)
            .table_elements(TABLE_MAX_ELEMENTS)
            .linear_memory_keep_resident(self.kept_bytes)
            .table_keep_resident(self.kept_bytes)
            .pagemap_scan(Enabled::Auto);
        let mut config = config();
        config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
        config
    }
}

/// Where the instances of one shard live.
#[derive(Clone)]
pub struct Pool {
    engine: Engine,
    slots: u32,
    pools: Arc<Pools>,
}

impl Pool {
    /// One that stands for itself, in an engine with other settings than a host's.
    ///
    /// # Errors
    /// As [`Pools::new`].
    pub fn of(engine: Engine, limits: &Limits) -> Result<Self> {
        let pools = Pools::new(limits, 1)?;
        pools.clock.add(engine.clone());
        Ok(Self { engine, slots: pools.slots, pools })
    }

    /// What compiled code has to fit.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }
}

/// As many of the slots wanted as there is room for, but not fewer than `least`.
fn fitting(wanted: u32, least: u32, room: Option<u64>) -> u32 {
    let room = room.map_or(wanted, |room| u32::try_from(room).unwrap_or(u32::MAX));
    wanted.min(room).max(least)
}

/// A loaded component, linked and ready to run the messages of one shard.
///
/// Cheap to share: its shard holds it behind an `Arc`.
pub struct Guest {
    pool: Pool,
    pre: InstancePre<State>,
    /// Where the function is that runs on messages.
    triage: ComponentExportIndex,
    /// Set when an instance has shown that it has the right type.
    fits: OnceLock<()>,
    /// Where the function is that takes the configuration, if there is one.
    configure: Option<ComponentExportIndex>,
    grants: Arc<Grants>,
    digest: Arc<str>,
    loaded: Arc<Loaded>,
}

impl Guest {
    /// Links `loaded` into the engine of `pool` and checks that it is a guest. It gets a copy of `grants`, for shards that
    /// count references to the same one would wait for each other.
    ///
    /// # Errors
    /// An import that nothing provides or grants, a missing `handler` export, or one of another shape; named, with the remedy.
    pub fn new(pool: Pool, loaded: Arc<Loaded>, grants: &Grants) -> Result<Self> {
        let engine = &pool.engine;
        let component = loaded.in_engine(engine)?;
        let name = loaded.path.display().to_string();
        let kind = component.component_type();
        if !kind.exports(engine).any(|(export, _)| export == interface::HANDLER) {
            let exports: Vec<&str> = kind.exports(engine).map(|(export, _)| export).collect();
            let exports = if exports.is_empty() { "nothing".to_string() } else { exports.join(", ") };
            let hint = if exports.contains("wasi:http/incoming-handler") {
                "this is a component for `wasmtime serve`; run the lean one here"
            } else {
                "build it for the world `triage` of the package mailroom:triage"
            };
            bail!("{name}: does not export {}, but {exports}; {hint}", interface::HANDLER);
        }
        if let Some(needs) = component.resources_required()
            && needs.num_memories > 1
        {
            bail!("{name}: has {} linear memories; a slot holds one, so merge its modules", needs.num_memories);
        }
        let linker = link(engine, &component, grants).with_context(|| name.clone())?;
        let other = || format!("{name}: does not fit the interfaces of this host");
        let pre = linker.instantiate_pre(&component).map_err(anyhow::Error::from).with_context(other)?;
        let (interface, function) = (interface::HANDLER, interface::TRIAGE);
        let exported = component.get_export_index(None, interface);
        let triage = exported.and_then(|exported| component.get_export_index(Some(&exported), function));
        let triage = triage.with_context(|| format!("no function {function} in {interface}")).with_context(other)?;
        let (interface, function) = interface::CONFIGURED;
        let configure = match component.get_export_index(None, interface) {
            Some(exported) => {
                let function = component.get_export(Some(&exported), function);
                let (kind, index) = function.unzip();
                ensure!(
                    kind.is_some_and(takes_pairs),
                    "{name}: exports {interface} in another shape; see wit/triage.wit"
                );
                index
            }
            None => None,
        };
        Ok(Self {
            pre,
            triage,
            fits: OnceLock::new(),
            configure,
            grants: Arc::new(grants.clone()),
            digest: loaded.digest.as_str().into(),
            loaded,
            pool,
        })
    }

    /// Another component in the same pool, with the same grants and bounds.
    ///
    /// # Errors
    /// As [`Guest::new`].
    pub fn with(&self, loaded: Arc<Loaded>) -> Result<Self> {
        Self::new(self.pool.clone(), loaded, &self.grants)
    }

    fn limits(&self) -> &Limits {
        &self.pool.pools.limits
    }

    /// The engine that it is compiled for.
    pub fn engine(&self) -> &Engine {
        &self.pool.engine
    }

    /// Makes an instance and throws it away: what only then shows is said at start instead of for every message.
    ///
    /// # Errors
    /// The component traps while it is instantiated, exceeds its limits, or exports a handler of another shape.
    pub async fn try_out(&self) -> Result<()> {
        let (started, limits) = (Instant::now(), self.limits());
        let mut store = self.store(started);
        let clock = &self.pool.pools.clock;
        let tried = clock.within(self.engine(), limits.deadline, started, pin!(self.instance(&mut store))).await;
        match tried {
            Some(Ok(_)) => Ok(()),
            Some(Err(err)) if err.is::<Trap>() || err.is::<WasmBacktrace>() => {
                let (_, detail) = broken(&err, store.data(), limits);
                bail!("{}: breaks off before its first message: {detail}", self.loaded.path.display())
            }
            Some(Err(err)) => Err(anyhow::Error::from(err))
                .with_context(|| format!("{}: does not fit the interfaces of this host", self.loaded.path.display())),
            None => bail!("{}: no instance within {:?}; see --deadline", self.loaded.path.display(), limits.deadline),
        }
    }

    /// The bounds of one instance whose time began at `started`.
    fn store(&self, started: Instant) -> Store<State> {
        let limits = self.limits();
        let mut store = Store::new(&self.pool.engine, State::new(self.grants.clone(), limits.memory_max_bytes));
        store.limiter(|state| &mut state.limiter);
        store.set_hostcall_fuel(limits.output_max_bytes);
        store.set_epoch_deadline(1);
        let (deadline, host_calls_max) = (limits.deadline, limits.host_calls_max);
        store.epoch_deadline_callback(move |store| {
            Ok(if started.elapsed() >= deadline || store.data().host_calls > host_calls_max {
                UpdateDeadline::Interrupt
            } else if turns::tick() {
                UpdateDeadline::Yield(1)
            } else {
                UpdateDeadline::Continue(1)
            })
        });
        store
    }

    /// A fresh instance that knows its configuration: its function.
    async fn instance(&self, mut store: &mut Store<State>) -> wasmtime::Result<Func> {
        let instance = self.pre.instantiate_async(&mut store).await?;
        let pairs = self.grants.configuration.pairs();
        if let (Some(configure), false) = (&self.configure, pairs.is_empty()) {
            let configure = instance.get_typed_func::<(&[(String, String)],), ()>(&mut store, configure)?;
            configure.call_async(&mut store, (pairs,)).await?;
        }
        if self.fits.get().is_none() {
            instance.get_typed_func::<(&Message,), (Answer,)>(&mut store, self.triage)?;
            let _ = self.fits.set(());
        }
        instance
            .get_func(&mut store, self.triage)
            .ok_or_else(|| wasmtime::Error::msg("the component exports its function, and this instance does not"))
    }

    async fn run(&self, message: &Message) -> Run {
        let started = Instant::now();
        let limits = self.limits();
        let deadline = limits.deadline;
        let mut store = self.store(started);

        let mut instantiate = Duration::ZERO;
        let run = async {
            let function = self.instance(&mut store).await?;
            instantiate = started.elapsed();
            // SAFETY: the type was checked on the first instance of this component (`fits`), and all have the same.
            // Checked on each, it costs a fortieth of a small message.
            let function = unsafe { TypedFunc::<(&Message,), (Answer,)>::new_unchecked(function) };
            function.call_async(&mut store, (message,)).await
        };
        let answer = self.pool.pools.clock.within(self.engine(), deadline, started, pin!(run)).await;
        let guest = started.elapsed().saturating_sub(instantiate);

        let state = store.data_mut();
        if let Some(output) = state.take_output() {
            output.log(&message.id);
        }
        let outcome = match answer {
            Some(Ok(_)) | None if state.host_calls > limits.host_calls_max => {
                Err(Failure::Broken(Fault::HostCalls, too_many_host_calls(limits)))
            }
            Some(Ok((answer,))) => outcome(answer),
            Some(Err(error)) => {
                let (fault, detail) = broken(&error, state, limits);
                Err(Failure::Broken(fault, detail))
            }
            None => {
                Err(Failure::Broken(Fault::Deadline, format!("no answer within {deadline:?}, waiting for the host")))
            }
        };
        Run { outcome, instantiate, guest }
    }
}

/// What the guest's function returns.
type Answer = Result<Verdict, interface::Failure>;

/// Whether it is the function that takes a configuration.
fn takes_pairs(function: ComponentItem) -> bool {
    let ComponentItem::ComponentFunc(function) = function else { return false };
    let is_pair = |kind| matches!(kind, Type::Tuple(pair) if pair.types().eq([Type::String, Type::String]));
    let are_pairs = |kind| matches!(kind, Type::List(list) if is_pair(list.ty()));
    let mut params = function.params();
    params.next().is_some_and(|(_, kind)| are_pairs(kind)) && params.next().is_none() && function.results().len() == 0
}

impl Handler for Guest {
    type Call = Call;

    fn name(&self) -> String {
        self.loaded.path.display().to_string()
    }

    fn digest(&self) -> &Arc<str> {
        &self.digest
    }

    /// The same component in a pool of that shard's own.
    fn for_shard(&self, number: u32) -> Result<Self> {
        Self::new(self.pool.pools.of_shard(number)?, self.loaded.clone(), &self.grants)
    }

    fn slots(&self) -> u32 {
        self.pool.slots
    }

    /// Runs the guest once on `message`, in a fresh instance.
    fn triage(self: &Arc<Self>, message: Arc<Message>) -> Call {
        let guest = self.clone();
        Box::pin(async move { guest.run(&message).await })
    }

    fn pool_use(&self) -> Option<PoolUse> {
        let pool = self.pool.engine.pooling_allocator_metrics()?;
        let kept_bytes = pool.unused_memory_bytes_resident() + pool.unused_table_bytes_resident();
        Some(PoolUse { instances: pool.component_instances(), kept_bytes })
    }
}

/// A guest at work on one message. It may move to another thread between two turns.
///
/// Takes at most the deadline, kept to a millisecond. The instance is gone when the run is there, and what the guest
/// wrote to its output streams is in the log then.
///
/// # Cancel safety
/// Dropping the call ends the instance and frees its slot.
pub type Call = Pin<Box<dyn Future<Output = Run> + Send>>;

/// Says what broke the instance off, and where.
fn broken(error: &wasmtime::Error, state: &State, limits: &Limits) -> (Fault, String) {
    let (fault, mut detail) = match error.downcast_ref::<Trap>() {
        Some(Trap::Interrupt) if state.host_calls > limits.host_calls_max => {
            (Fault::HostCalls, too_many_host_calls(limits))
        }
        Some(Trap::Interrupt) => (Fault::Deadline, format!("no answer within {:?}", limits.deadline)),
        Some(Trap::StackOverflow) => (Fault::Stack, "stack overflow".to_string()),
        _ if state.limiter.memory_refused => {
            (Fault::Memory, format!("more than {} bytes of memory wanted", limits.memory_max_bytes))
        }
        Some(trap) => (Fault::Trap, trap.to_string().trim_start_matches("wasm trap: ").to_string()),
        None => {
            let cause = error.root_cause().to_string();
            let fault = if cause.contains("fuel allocated for hostcalls") { Fault::Output } else { Fault::Trap };
            (fault, cause)
        }
    };
    if let Some(backtrace) = error.downcast_ref::<WasmBacktrace>() {
        let frames: Vec<String> = backtrace
            .frames()
            .iter()
            .map(|frame| match frame.func_name() {
                Some(name) => demangled(name),
                None => format!("function {}", frame.func_index()),
            })
            .collect();
        if !frames.is_empty() {
            detail.push_str("; in ");
            detail.push_str(&frames.join(" < "));
        }
    }
    (fault, detail)
}

fn too_many_host_calls(limits: &Limits) -> String {
    format!("more than {} calls to the host", limits.host_calls_max)
}

/// A function's name as its author wrote it.
fn demangled(name: &str) -> String {
    rustc_demangle::try_demangle(name).map_or_else(|_| name.to_string(), |name| format!("{name:#}"))
}

#[cfg(all(test, feature = "compile"))]
mod fuzz {
    use super::*;
    use crate::component::from_bytes;
    use crate::interface::Issue;
    use ::fuzz::{Strategy, any, check, collection, option, prop_oneof, sample};
    use std::path::{Path, PathBuf};

    const LIMITS: Limits = Limits {
        slots: Some(1),
        memory_max_bytes: 64 << 20,
        deadline: Duration::from_secs(30),
        output_max_bytes: 64 << 10,
        host_calls_max: 100_000,
    };

    /// A component that is built, in a pool as hosts have it.
    struct Bench {
        guest: Arc<Guest>,
        runtime: tokio::runtime::Runtime,
    }

    impl Bench {
        fn of(name: &str) -> Self {
            let folder = std::env::var_os("MAILROOM_TEST_COMPONENTS")
                .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/components"), PathBuf::from);
            let path = folder.join(name).with_extension("wasm");
            let bytes = std::fs::read(&path)
                .unwrap_or_else(|err| panic!("{}: {err}; `cargo xtask build` makes it", path.display()));
            let pool = Pools::new(&LIMITS, 1).and_then(|pools| pools.of_shard(0)).expect("a pool");
            let loaded = Arc::new(from_bytes(pool.engine(), &path, &bytes).expect("a component"));
            let guest = Arc::new(Guest::new(pool, loaded, &Grants::default()).expect("a guest"));
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
            Self { guest, runtime }
        }

        fn run(&self, message: Message) -> Result<Verdict, Failure> {
            self.runtime.block_on(self.guest.triage(Arc::new(message))).outcome
        }

        fn tell(&self, command: &str) -> Result<Verdict, Failure> {
            self.run(message(command.as_bytes()))
        }
    }

    fn message(data: &[u8]) -> Message {
        let (id, subject) = ("MAIL:1:triage:1".into(), "mail.test".into());
        Message { id, subject, headers: Vec::new(), time: 0, attempt: 1, data: data.to_vec() }
    }

    fn is_out_of_bounds(outcome: &Result<Verdict, Failure>) -> bool {
        matches!(outcome, Err(Failure::Broken(Fault::Output, _)))
    }

    /// What a guest answers comes out as it said it, up to each bound of the interface and not beyond.
    #[test]
    fn answers_are_taken_up_to_their_bounds() {
        let actor = Bench::of("actor");
        let length = || prop_oneof![0..3_usize, 62..67_usize, 254..259_usize, 0..70_000_usize];
        check("reasons around their bounds", 400, (0..20_usize, length()), |(count, bytes)| {
            let outcome = actor.tell(&format!("reasons {count} {bytes}"));
            let fits = count <= 16 && (bytes <= 256 || count == 0);
            assert_eq!(is_out_of_bounds(&outcome), !fits, "{outcome:?}");
            if let Ok(verdict) = outcome {
                assert_eq!(verdict.reasons, vec!["r".repeat(bytes); count]);
            }
        });
        let queue = prop_oneof![length().prop_map(|bytes| "q".repeat(bytes)), "[a-z0-9_-]{60,66}", "[\\PC&&[^ ]]{0,9}"];
        let issue = prop_oneof![length().prop_map(|bytes| "i".repeat(bytes)), "[\\PC&&[^ ]]{0,300}", "[a-c\t\0]{1,4}"];
        let kind = sample::select(vec!["new", "existing"]);
        check("names around their bounds", 1_500, (queue, kind, issue), |(queue, kind, issue)| {
            let outcome = actor.tell(&format!("verdict {queue} high {kind} {issue}"));
            let plain = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-');
            let fits = (1..=64).contains(&queue.len())
                && queue.bytes().all(plain)
                && (1..=256).contains(&issue.len())
                && !issue.chars().any(char::is_control);
            match outcome {
                Ok(verdict) => {
                    assert!(fits, "{verdict:?}");
                    let (Issue::New(id) | Issue::Existing(id)) = &verdict.issue;
                    assert_eq!((verdict.queue.as_str(), id.as_str()), (queue.as_str(), issue.as_str()));
                }
                outcome => assert!(!fits && is_out_of_bounds(&outcome), "{outcome:?}"),
            }
        });
    }

    /// Whatever a message carries reaches the guest: headers without number and of any bytes, empty and long.
    #[test]
    fn any_message_reaches_the_guest() {
        let actor = Bench::of("actor");
        let few = collection::vec(("\\PC{0,20}", collection::vec(any::<u8>(), 0..100)), 0..12);
        let many = (0..5_000_usize, 0..200_usize)
            .prop_map(|(count, bytes)| vec![("Name".to_owned(), vec![0xff; bytes]); count]);
        let long = (0..2_000_000_usize).prop_map(|bytes| vec![("Long".to_owned(), vec![b'x'; bytes])]);
        let headers = prop_oneof![8 => few, 1 => many, 1 => long];
        let numbers = (any::<u64>(), any::<u32>());
        check(
            "messages of any kind",
            300,
            ("\\PC{0,80}", "\\PC{0,200}", headers, numbers),
            |(id, subject, headers, numbers)| {
                let (time, attempt) = numbers;
                let sent = Message { id, subject, headers, time, attempt, data: b"echo".to_vec() };
                let mut told =
                    vec![sent.id.clone(), sent.subject.clone(), time.to_string(), attempt.to_string(), "4".into()];
                let headers = sent.headers.iter().take(10);
                told.extend(headers.map(|(name, value)| format!("{name}={}", String::from_utf8_lossy(value))));
                let fits = told.iter().all(|reason| reason.len() <= 256);
                match actor.run(sent) {
                    Ok(verdict) => assert_eq!(verdict.reasons, told),
                    outcome => assert!(!fits && is_out_of_bounds(&outcome), "{outcome:?}"),
                }
            },
        );
    }

    /// The triage answers any bytes within the bounds, and the same whatever the delivery.
    #[test]
    fn the_triage_answers_any_mail_the_same_at_every_delivery() {
        let triage = Bench::of("triage");
        let line = prop_oneof![
            "(Subject|From|To|References|Content-Type|X-Priority): \\PC{0,60}",
            "\\PC{0,80}",
            sample::select(vec!["", "Subject: urgent outage", "multipart/mixed; boundary=b", "--b"])
                .prop_map(str::to_owned),
        ];
        let text = collection::vec(line, 0..20).prop_map(|lines| lines.join("\n").into_bytes());
        let mail = prop_oneof![text, collection::vec(any::<u8>(), 0..3_000)];
        let header = option::of(("\\PC{0,20}", collection::vec(any::<u8>(), 0..100)));
        check("deliveries of a mail", 3_000, (mail, header, any::<u32>()), |(mail, header, attempt)| {
            let first = message(&mail);
            let again = Message { headers: header.into_iter().collect(), attempt, ..first.clone() };
            let outcome = triage.run(first);
            assert!(!matches!(outcome, Err(Failure::Broken(..) | Failure::Retry(..))), "{outcome:?}");
            assert_eq!(format!("{outcome:?}"), format!("{:?}", triage.run(again)));
        });
    }
}
