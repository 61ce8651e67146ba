//! Components that mean harm: each costs its own message only, ends where the page says, and its neighbours in the
//! same host get their verdicts.

use crate::crafted;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use tests::bed::{Bed, SOON};
use tests::prelude::*;

/// Two deliveries, neither of which takes long; and time enough for what ends before the deadline, on a busy machine.
const IMPATIENT: [&str; 12] = [
    "--attempts",
    "2",
    "--retry-min",
    "10ms",
    "--retry-max",
    "50ms",
    "--deadline",
    "3s",
    "--memory-max",
    "8MiB",
    "--host-calls-max",
    "10000",
];

/// One thing that a hostile guest tries.
struct Attempt {
    /// What it tries; where it runs code of its own for that, the name of its function.
    name: &'static str,
    when: When,
    /// Code, in wat.
    code: String,
    /// The reason in the dead letter; a verdict where it is empty.
    reason: &'static str,
    /// What the dead letter's detail says.
    detail: &'static str,
}

/// When its code runs.
enum When {
    /// In `triage`; what it leaves on the stack is where its answer lies.
    Triage,
    /// In `cabi_realloc`, for the message's data.
    Realloc,
    /// In the function that frees the answer.
    PostReturn,
}

fn attempt(name: &'static str, code: &str, reason: &'static str, detail: &'static str) -> Attempt {
    Attempt { name, when: When::Triage, code: code.to_owned(), reason, detail }
}

/// An answer that is good but for these of its words: see [`ANSWER`].
fn answer(name: &'static str, words: &[(usize, u32)], reason: &'static str, detail: &'static str) -> Attempt {
    let mut code = String::new();
    for (at, value) in words {
        _ = write!(code, "(i32.store (i32.const {}) (i32.const {value})) ", at * 4);
    }
    Attempt { name, when: When::Triage, code: code + "(i32.const 0)", reason, detail }
}

/// A good answer, as it lies in memory at 0: ok, low, new, then address and length of issue, queue and reasons.
const ANSWER: [u32; 9] = [0, 0, 0, 64, 2, 72, 7, 0, 0];
const QUEUE: usize = 5;
const REASONS: usize = 7;

/// Everything that is tried in one component, each by a message of its own.
fn attempts() -> Vec<Attempt> {
    let now = "(drop (call $now))";
    let spin = "(loop $again (br $again))";
    let realloc =
        |name, code: &str, reason, detail| Attempt { when: When::Realloc, ..attempt(name, code, reason, detail) };
    let post_return =
        |name, code: &str, reason, detail| Attempt { when: When::PostReturn, ..attempt(name, code, reason, detail) };
    vec![
        attempt("endless_loop", &format!("{spin} unreachable"), "deadline", "within 3s; in endless_loop < triage"),
        attempt("endless_recursion", "(call $endless_recursion)", "stack", "stack overflow; in endless_recursion < endless_recursion"),
        attempt("division_by_zero", "(i32.div_u (i32.const 1) (i32.const 0))", "trap", "divide by zero; in division_by_zero < triage"),
        attempt("stray_load", "(i32.load (i32.const -8))", "trap", "out of bounds memory access"),
        attempt("stray_call", "(call_indirect (result i32) (i32.const 7))", "trap", "uninitialized element"),
        attempt("memory_in_one", "(drop (memory.grow (i32.const 60000))) unreachable", "memory", "8388608 bytes"),
        attempt(
            "memory_in_steps",
            "(loop $again (br_if $again (i32.ne (memory.grow (i32.const 1)) (i32.const -1)))) unreachable",
            "memory",
            "8388608 bytes",
        ),
        attempt("memory_whatever_comes", "(loop $again (drop (memory.grow (i32.const 1))) (br $again)) unreachable", "deadline", "3s"),
        attempt(
            "table_without_bound",
            "(loop $again (br_if $again (i32.ne (table.grow (ref.null func) (i32.const 100)) (i32.const -1))))
             (if (i32.gt_u (table.size) (i32.const 20000)) (then unreachable)) (i32.const 0)",
            "",
            "",
        ),
        // Calls to the host.
        attempt("calls_without_end", &format!("(loop $again {now} (br $again)) unreachable"), "host-calls", "10000 calls"),
        attempt("calls_in_a_row", &format!("{} (i32.const 0)", now.repeat(10_001)), "host-calls", "10000 calls"),
        attempt("calls_as_many_as_allowed", &format!("{} (i32.const 0)", now.repeat(10_000)), "", ""),
        attempt(
            "pollables_without_end",
            "(loop $again (drop (call $subscribe (i64.const 1))) (br $again)) unreachable",
            "host-calls",
            "10000 calls",
        ),
        attempt("sleep_for_ever", "(call $block (call $subscribe (i64.const -1))) unreachable", "deadline", "waiting for the host"),
        attempt("handles_without_end", "(loop $again (drop (call $hoard (i32.const 1))) (br $again)) unreachable", "trap", "handle limit"),
        attempt("forged_handle", "(call $block (i32.const 4711)) unreachable", "trap", "unknown handle"),
        attempt("random_beyond_bounds", "(call $random (i64.const -1) (i32.const 128)) unreachable", "trap", "exceeds limit"),
        attempt("zeroes_beyond_bounds", "(call $zeroes (call $stdout) (i64.const 0x10000000000) (i32.const 128)) unreachable", "trap", "more zeroes"),
        attempt("endless_output", "(local $out i32) (local.set $out (call $stdout))
            (loop $again (call $write (local.get $out) (i32.const 0) (i32.const 4096) (i32.const 128)) (br $again)) unreachable", "host-calls", "10000 calls"),
        attempt(
            "lines_without_end",
            "(local $out i32) (local.set $out (call $stdout))
             (memory.fill (i32.const 4096) (i32.const 10) (i32.const 4096))
             (loop $again (call $write (local.get $out) (i32.const 4096) (i32.const 4096) (i32.const 128)) (br $again)) unreachable",
            "host-calls",
            "10000 calls",
        ),
        attempt("exit_with_success", "(call $exit (i32.const 0)) unreachable", "trap", "exit"),
        // Answers that are none.
        attempt("answer_nowhere", "(i32.const -4)", "trap", "out of bounds"),
        attempt("answer_unaligned", "(i32.const 2)", "trap", "not aligned"),
        answer("neither_ok_nor_error", &[(0, 2)], "trap", "invalid expected discriminant"),
        answer("no_such_priority", &[(1, 9)], "trap", "discriminant"),
        answer("no_such_issue", &[(2, 7)], "trap", "discriminant"),
        answer("queue_nowhere", &[(QUEUE, 0xffff_0000)], "trap", "out of bounds"),
        answer("queue_of_4_gib", &[(QUEUE + 1, 0xffff_ffff)], "trap", "out of bounds"),
        answer("queue_of_all_memory", &[(QUEUE, 0), (QUEUE + 1, 128 << 10)], "output", "fuel"),
        answer("queue_not_utf8", &[(QUEUE, 80), (QUEUE + 1, 4)], "trap", "utf-8"),
        answer("reasons_of_4_gib", &[(REASONS, 0), (REASONS + 1, 0xffff_ffff)], "trap", "out of bounds"),
        answer("reasons_unaligned", &[(REASONS, 1), (REASONS + 1, 1)], "trap", "not aligned"),
        answer("ten_thousand_reasons", &[(REASONS, 4096), (REASONS + 1, 10_000)], "output", "fuel"),
        // Each of 1,000 reasons is the same 60 kB: little in the guest, 60 MB in the host.
        attempt(
            "reasons_that_overlap",
            "(local $at i32) (local.set $at (i32.const 4096))
             (loop $again
                (i32.store (local.get $at) (i32.const 0))
                (i32.store offset=4 (local.get $at) (i32.const 60000))
                (br_if $again (i32.lt_u (local.tee $at (i32.add (local.get $at) (i32.const 8))) (i32.const 12096))))
             (i32.store (i32.const 28) (i32.const 4096)) (i32.store (i32.const 32) (i32.const 1000)) (i32.const 0)",
            "output",
            "fuel",
        ),
        answer("queue_of_another_subject", &[(QUEUE, 84), (QUEUE + 1, 4)], "output", "../x"),
        // Where no code of its own should run for long.
        realloc("realloc_without_end", spin, "deadline", "realloc_without_end"),
        realloc("realloc_that_traps", "unreachable", "trap", "realloc_that_traps"),
        realloc("realloc_elsewhere", "(global.set $free (i32.const -16))", "trap", "beyond end of memory"),
        realloc("realloc_that_calls_out", now, "trap", "cannot leave component instance"),
        post_return("post_return_without_end", spin, "deadline", "post_return_without_end"),
        post_return("post_return_that_traps", "unreachable", "trap", "post_return_that_traps"),
        post_return("post_return_that_calls_out", now, "trap", "cannot leave component instance"),
    ]
}

/// The interfaces that the component imports, as far as it uses them, and one that it exports to have a resource.
const WORLD: &str = "
package test:crafted;
interface things { resource thing; }
world crafted {
    import wasi:clocks/monotonic-clock@0.2.0;
    import wasi:random/random@0.2.0;
    import wasi:cli/stdout@0.2.0;
    import wasi:cli/exit@0.2.0;
    export mailroom:triage/handler@0.1.0;
    export things;
}
package wasi:io@0.2.0 {
    interface error { resource error; }
    interface poll { resource pollable { block: func(); } }
    interface streams {
        use error.{error};
        variant stream-error { last-operation-failed(error), closed }
        resource output-stream {
            write: func(contents: list<u8>) -> result<_, stream-error>;
            write-zeroes: func(len: u64) -> result<_, stream-error>;
        }
    }
}
package wasi:clocks@0.2.0 {
    interface monotonic-clock {
        use wasi:io/poll@0.2.0.{pollable};
        now: func() -> u64;
        subscribe-duration: func(when: u64) -> pollable;
    }
}
package wasi:cli@0.2.0 {
    interface stdout { use wasi:io/streams@0.2.0.{output-stream}; get-stdout: func() -> output-stream; }
    interface exit { exit: func(status: result); }
}
package wasi:random@0.2.0 {
    interface random { get-random-bytes: func(len: u64) -> list<u8>; }
}";

/// A message of this many bytes is the first attempt, one of a byte more the second, and so on: `cabi_realloc` learns
/// the length before anything else runs. Shorter ones get a verdict.
const FIRST: usize = 1000;

/// The core module that makes all the attempts.
fn module(attempts: &[Attempt]) -> String {
    let [mut functions, mut triage, mut realloc, mut post_return] = [const { String::new() }; 4];
    for (number, Attempt { name, when, code, .. }) in attempts.iter().enumerate() {
        let (calls, result): (&mut String, _) = match when {
            When::Triage => (&mut triage, "(result i32)"),
            When::Realloc => (&mut realloc, ""),
            When::PostReturn => (&mut post_return, ""),
        };
        _ = writeln!(functions, "(func ${name} {result} {code})");
        let call = if result.is_empty() { format!("(call ${name})") } else { format!("(return (call ${name}))") };
        let length = FIRST + number;
        _ = writeln!(calls, "(if (i32.eq (global.get $length) (i32.const {length})) (then {call}))");
    }
    let answer: String =
        ANSWER.iter().flat_map(|word| word.to_le_bytes()).map(|byte| format!("\\{byte:02x}")).collect();
    format!(
        r#"(module
        (import "wasi:clocks/monotonic-clock@0.2.0" "now" (func $now (result i64)))
        (import "wasi:clocks/monotonic-clock@0.2.0" "subscribe-duration" (func $subscribe (param i64) (result i32)))
        (import "wasi:io/poll@0.2.0" "[method]pollable.block" (func $block (param i32)))
        (import "wasi:io/streams@0.2.0" "[method]output-stream.write" (func $write (param i32 i32 i32 i32)))
        (import "wasi:io/streams@0.2.0" "[method]output-stream.write-zeroes" (func $zeroes (param i32 i64 i32)))
        (import "wasi:cli/stdout@0.2.0" "get-stdout" (func $stdout (result i32)))
        (import "wasi:cli/exit@0.2.0" "exit" (func $exit (param i32)))
        (import "wasi:random/random@0.2.0" "get-random-bytes" (func $random (param i64 i32)))
        (import "[export]test:crafted/things" "[resource-new]thing" (func $hoard (param i32) (result i32)))
        (memory (export "memory") 4)
        (table 10 funcref)
        (global $length (mut i32) (i32.const 0))
        (global $free (mut i32) (i32.const 65536))
        (data (i32.const 0) "{answer}")
        (data (i32.const 64) "i1")
        (data (i32.const 72) "support")
        (data (i32.const 80) "\ff\fe\fd\fc../x")
        (func $cabi_realloc (export "cabi_realloc") (param i32 i32 i32) (param $size i32) (result i32)
            (global.set $length (local.get $size))
            {realloc}
            (global.set $free (i32.and (i32.add (global.get $free) (i32.const 15)) (i32.const -16)))
            (global.get $free)
            (global.set $free (i32.add (global.get $free) (local.get $size))))
        (func $triage (export "mailroom:triage/handler@0.1.0#triage")
            (param i32 i32 i32 i32 i32 i32 i64 i32 i32) (param $size i32) (result i32)
            (global.set $length (local.get $size))
            {triage}
            (i32.const 0))
        (func $post_return (export "cabi_post_mailroom:triage/handler@0.1.0#triage") (param i32)
            {post_return})
        {functions})"#
    )
}

/// Whatever a component tries, at whatever moment, it costs its own message only.
#[tokio::test]
async fn hostile_components_cost_their_own_message_only() -> Result<()> {
    let attempts = attempts();
    let folder = crafted::folder()?;
    let component = crafted::file(folder.path(), "hostile.wasm", crafted::guest_of(&module(&attempts), WORLD)?)?;
    let bed = Bed::new().await?;
    let host = Host::on(bed.server.url()).component(component).args(IMPATIENT).start().await?;
    host.until_ready(SOON).await?;
    let payloads = (FIRST..FIRST + attempts.len()).flat_map(|length| ["neighbour".to_owned(), "x".repeat(length)]);
    bed.tell(payloads).await?;
    let expected = attempts.iter().map(|attempt| (attempt.name, attempt.reason, attempt.detail));
    settled_as(&bed, &host, (2..).step_by(2).zip(expected)).await?;
    host.wait_for_line(SOON, |line| line.contains("… and 16184 lines more")).await?;
    // The neighbours' verdicts and those that the attempts ended with.
    let verdicts = streams::count(&bed.jetstream, streams::VERDICTS).await?;
    assert_eq!(verdicts as usize, attempts.len() + attempts.iter().filter(|attempt| attempt.reason.is_empty()).count());
    Ok(())
}

/// The same with what an ordinary toolchain makes of Rust, where the detail names functions as their author did.
#[tokio::test]
async fn hostile_guests_in_rust_cost_their_own_message_only() -> Result<()> {
    let bed = Bed::new().await?;
    let host = bed.actor(&IMPATIENT).await?;
    let long_queue = format!("verdict {}", "q".repeat(65));
    let cases = [
        ("call", "host-calls", "actor::"),
        ("hoard", "memory", "actor::"),
        ("grow", "deadline", "actor::"),
        ("allocate 1000", "memory", "actor::"),
        ("recurse", "stack", "actor::recurse"),
        ("loop", "deadline", "actor::"),
        ("stray", "trap", "unreachable` instruction executed; in call_indirect_of_no_such_function < actor::stray"),
        ("sleep 4000000", "deadline", "waiting for the host"),
        ("flood 100", "host-calls", "actor::"),
        ("reasons 10000 1", "output", "fuel"),
        ("verdict ../x", "output", "../x"),
        ("verdict a.b", "output", "a.b"),
        ("verdict *", "output", "*"),
        ("verdict >", "output", ">"),
        ("verdict ", "output", "\"\""),
        (&long_queue, "output", "1 to 64"),
    ];
    bed.tell(cases.iter().flat_map(|case| ["verdict neighbour", case.0])).await?;
    settled_as(&bed, &host, (2..).step_by(2).zip(cases)).await?;
    assert_eq!(streams::count(&bed.jetstream, streams::VERDICTS).await?, cases.len() as u64);
    Ok(())
}

/// Calls are counted for a guest that waits in them as well.
#[tokio::test]
async fn a_guest_that_waits_has_its_calls_counted_too() -> Result<()> {
    let bed = Bed::new().await?;
    let _host = bed.actor(&["--host-calls-max", "100", "--attempts", "1", "--deadline", "20s"]).await?;
    bed.tell(["nap", "verdict neighbour"]).await?;
    bed.settled().await?;
    let letter = &bed.dead_letters(1).await?[0];
    assert_eq!(letter.header("Mailroom-Reason"), Some("host-calls"));
    let detail = letter.header("Mailroom-Detail").context("a detail")?;
    ensure!(detail.starts_with("more than 100 calls to the host; in ") && detail.contains("nanosleep"), "{detail}");
    bed.verdicts(1).await?;
    Ok(())
}

/// Waits until everything is settled, and checks what became of each of `cases`, which are the mail's sequence, a
/// name, the reason in its dead letter (empty: it has none) and a part of the detail; in the metrics too.
async fn settled_as(bed: &Bed, host: &Host, cases: impl IntoIterator<Item = (u64, (&str, &str, &str))>) -> Result<()> {
    bed.settled().await?;
    let letters = streams::dead_letters(&bed.jetstream).await?;
    let mut wrong = String::new();
    let mut reasons: BTreeMap<&str, f64> = BTreeMap::new();
    for (sequence, (name, reason, detail)) in cases {
        let letter = letters.iter().find(|letter| letter.mail_sequence().ok() == Some(sequence));
        let found = |header| letter.and_then(|letter| letter.header(header)).unwrap_or_default();
        let deliveries = if reason.is_empty() { "" } else { "2" };
        let (is, says) = (found("Mailroom-Reason"), found("Mailroom-Detail"));
        if is != reason || found("Mailroom-Deliveries") != deliveries || !says.contains(detail) {
            writeln!(wrong, "{name}: {reason:?} with {detail:?} expected: {is:?}: {says}")?;
        }
        if !reason.is_empty() {
            *reasons.entry(reason).or_default() += 1.0;
        }
    }
    ensure!(wrong.is_empty(), "not as expected:\n{wrong}");
    assert_eq!(letters.len() as f64, reasons.values().sum::<f64>());
    let look = async || {
        let metrics = host.metrics().await?;
        let count = |labels: &[(&str, &str)]| metrics.get("mailroom_messages_total", labels);
        let dead: Vec<_> = reasons.keys().map(|reason| count(&[("outcome", "dead"), ("reason", reason)])).collect();
        // On a busy machine a first run may end for want of time.
        Ok((dead, count(&[("outcome", "retry")])))
    };
    let counted = (reasons.values().copied().map(Some).collect(), Some(reasons.values().sum()));
    eventually(SOON, "all in the metrics", look, |found| *found == counted).await.map(drop)
}

/// Nothing that a guest leaves in memory, tables or globals reaches the next message, though its slot is the same.
#[tokio::test]
async fn nothing_is_left_for_the_next_message() -> Result<()> {
    // Answers `support` if memory, table and global are as the module has them, `left-over` if not; then writes
    // over all of them, and traps if the mail is longer than a few bytes.
    let module = r#"(module
        (memory (export "memory") 2)
        (table $table 10 funcref)
        (elem declare func $triage)
        (global $mark (mut i32) (i32.const 0))
        (data (i32.const 0) "\00\00\00\00\00\00\00\00\00\00\00\00\40\00\00\00\02\00\00\00\48\00\00\00\07\00\00\00\00\00\00\00\00\00\00\00")
        (data (i32.const 64) "i1")
        (data (i32.const 72) "supportleft-over")
        (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) (i32.const 1024))
        (func $triage (export "mailroom:triage/handler@0.1.0#triage")
            (param i32 i32 i32 i32 i32 i32 i64 i32 i32) (param $size i32) (result i32)
            (local $at i32) (local $seen i32)
            (local.set $seen (i32.or (global.get $mark) (i32.eqz (ref.is_null (table.get $table (i32.const 3))))))
            (if (i32.ne (memory.size) (i32.const 2)) (then (local.set $seen (i32.const 1))))
            (drop (memory.grow (i32.const 100)))
            (local.set $at (i32.const 4096))
            (loop $next
                (local.set $seen (i32.or (local.get $seen) (i32.load (local.get $at))))
                (i32.store (local.get $at) (i32.const -1))
                (local.set $at (i32.add (local.get $at) (i32.const 4)))
                (br_if $next (i32.lt_u (local.get $at) (i32.const 6684672))))
            (global.set $mark (i32.const 1))
            (table.fill $table (i32.const 0) (ref.func $triage) (i32.const 10))
            (if (i32.gt_u (local.get $size) (i32.const 10)) (then unreachable))
            (if (local.get $seen)
                (then (i32.store (i32.const 20) (i32.const 79)) (i32.store (i32.const 24) (i32.const 9))))
            (i32.const 0)))"#;
    let world = "package test:crafted; world crafted { export mailroom:triage/handler@0.1.0; }";
    let folder = crafted::folder()?;
    let component = crafted::file(folder.path(), "marks.wasm", crafted::guest_of(module, world)?)?;
    let bed = Bed::new().await?;
    let args = ["--shards", "1", "--slots", "1", "--attempts", "1", "--deadline", "20s"];
    let _host = Host::on(bed.server.url()).component(component).args(args).start().await?;
    bed.tell(["calm", "calm", "a mail to trap on", "calm", "calm"]).await?;
    bed.settled().await?;
    let verdicts = streams::verdicts(&bed.jetstream).await?;
    let queues: Vec<_> = verdicts.iter().map(|verdict| Ok(verdict.json()?["queue"].clone())).collect::<Result<_>>()?;
    assert_eq!(queues, ["support"; 4]);
    assert_eq!(streams::count(&bed.jetstream, streams::DEAD).await?, 1);
    Ok(())
}

/// A component that never gets through its own start is refused with the reason, instead of costing every mail its
/// attempts.
#[tokio::test]
async fn a_component_that_breaks_off_at_its_start_is_refused() -> Result<()> {
    let folder = crafted::folder()?;
    for (name, code, reason) in [
        ("start_without_end", "(loop $again (br $again))", "no answer within 100ms; in start_without_end"),
        ("start_that_traps", "unreachable", "executed; in start_that_traps"),
        ("start_that_recurses", "(call $start_that_recurses)", "stack overflow; in start_that_recurses"),
        ("start_that_grows", "(drop (memory.grow (i32.const 60000))) unreachable", "67108864 bytes of memory"),
    ] {
        let module = format!(
            r#"(module
                (memory (export "memory") 1)
                (func ${name} {code})
                (start ${name})
                (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) (i32.const 0))
                (func (export "mailroom:triage/handler@0.1.0#triage")
                    (param i32 i32 i32 i32 i32 i32 i64 i32 i32 i32) (result i32) (i32.const 0)))"#
        );
        let world = "package test:crafted; world crafted { export mailroom:triage/handler@0.1.0; }";
        let component: PathBuf = crafted::file(folder.path(), "start.wasm", crafted::guest_of(&module, world)?)?;
        let component = component.display().to_string();
        let output =
            command::host(["run", "--component", &component, "--listen", "none", "--deadline", "100ms"]).await?;
        ensure!(output.code() == Some(1), "{name}: {output:?}");
        let expected = format!("{component}: breaks off before its first message: ");
        ensure!(output.stderr.contains(&expected) && output.stderr.contains(reason), "{name}: {output:?}");
    }
    Ok(())
}

/// A message above the bound is a dead letter, whole, without being run; one at the bound gets its verdict. Headers
/// count.
#[tokio::test]
async fn a_message_that_is_too_large_is_not_run() -> Result<()> {
    let bed = Bed::new().await?;
    let host = bed.actor(&["--message-max", "10000B"]).await?;
    let padded = |bytes: usize| format!("{:<bytes$}", "verdict support\n");
    bed.tell([padded(10_000), padded(10_001)]).await?;
    for bytes in [9_000, 9_001] {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Name", "v".repeat(996));
        bed.tell_with(headers, &padded(bytes)).await?;
    }
    bed.settled().await?;
    let sequences = |stored: &[Stored]| stored.iter().map(Stored::mail_sequence).collect::<Result<Vec<_>>>();
    let letters = streams::dead_letters(&bed.jetstream).await?;
    assert_eq!(sequences(&streams::verdicts(&bed.jetstream).await?)?, [1, 3]);
    assert_eq!(sequences(&letters)?, [2, 4]);
    for letter in &letters {
        assert_eq!(letter.header("Mailroom-Reason"), Some("message-too-large"));
        assert_eq!(letter.header("Mailroom-Detail"), Some("10001 bytes with its headers; at most 10000 are run"));
        assert_eq!(letter.header("Mailroom-Deliveries"), Some("1"));
    }
    assert_eq!((letters[0].payload.len(), letters[1].payload.len()), (10_001, 9_001));
    let look = async || {
        let labels = [("outcome", "dead"), ("reason", "message-too-large")];
        Ok(host.metrics().await?.get("mailroom_messages_total", &labels))
    };
    eventually(SOON, "both in the metrics", look, |dead| *dead == Some(2.0)).await.map(drop)
}
