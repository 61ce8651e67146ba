//! A guest for the tests that does what the first line of the mail says.
//!
//! An ordinary component: built for `wasm32-wasip2` with the standard library, without any of the tuning of the
//! real guest, as most people will build theirs. The commands are the arms of [`act`].
#![expect(missing_docs, reason = "the generated bindings have no documentation of their own")]

#[cfg(feature = "http")]
mod requests;

use std::hint::black_box;
use std::io::Write as _;
use std::time::{Duration, Instant};
use std::{env, fs, thread};

wit_bindgen::generate!({ path: "../../wit", world: "triage", generate_all });

use exports::mailroom::triage::handler;
use mailroom::triage::types::{Failure, Issue, Message, Priority, Retry, Verdict};
use wasi::config::store;

struct Actor;

impl handler::Guest for Actor {
    fn triage(message: Message) -> Result<Verdict, Failure> {
        let data = String::from_utf8_lossy(&message.data);
        let words: Vec<&str> = data.lines().next().unwrap_or_default().split(' ').collect();
        act(&words, &message)
    }
}

export!(Actor);

/// What each command does; the words after it are its arguments.
fn act(words: &[&str], message: &Message) -> Result<Verdict, Failure> {
    match words {
        // A verdict as told: verdict QUEUE [PRIORITY [new|existing ID]]
        ["verdict", queue] => Ok(verdict(queue)),
        ["verdict", queue, priority] => Ok(Verdict { priority: priority_of(priority)?, ..verdict(queue) }),
        ["verdict", queue, priority, kind, id] => {
            let issue = match *kind {
                "new" => Issue::New((*id).to_owned()),
                "existing" => Issue::Existing((*id).to_owned()),
                _ => return Err(unknown(words)),
            };
            Ok(Verdict { priority: priority_of(priority)?, issue, ..verdict(queue) })
        }
        // Everything the host told the guest about the message; at once, or at this attempt.
        ["echo"] => Ok(echo(message)),
        ["echo-at", attempt, delay] => not_before(attempt, delay, words, message).map(|()| echo(message)),
        // The configuration: key=value.
        ["config"] => match store::get_all() {
            Ok(pairs) => {
                let reasons = pairs.into_iter().map(|(key, value)| format!("{key}={value}")).collect();
                Ok(Verdict { reasons, ..verdict("config") })
            }
            Err(error) => Err(Failure::Reject(error.to_string())),
        },
        // What a guest finds of the outer world, which should be nothing.
        ["environment"] => {
            let reasons = vec![
                format!("variables: {}", env::vars_os().count()),
                format!("arguments: {}", env::args_os().count()),
                format!("folder /: {}", outcome(fs::read_dir("/"))),
                format!("file /etc/passwd: {}", outcome(fs::File::open("/etc/passwd"))),
            ];
            Ok(Verdict { reasons, ..verdict("environment") })
        }
        // Failures that the guest reports itself: retry [MS], reject TEXT…
        ["retry"] => Err(Failure::Retry(Retry { after_ms: None, reason: "told to".to_owned() })),
        ["retry", delay] => {
            Err(Failure::Retry(Retry { after_ms: Some(number(delay, words)?), reason: "told to".to_owned() }))
        }
        // Asks for another delivery until this attempt, each time after this long.
        ["retry-until", attempt, delay] => not_before(attempt, delay, words, message).map(|()| verdict("in-time")),
        ["reject", text @ ..] => Err(Failure::Reject(text.join(" "))),
        // A different answer at another delivery.
        ["fail-until", attempt] => {
            assert!(message.attempt >= number(attempt, words)?, "attempt {} fails as told", message.attempt);
            Ok(verdict("recovered"))
        }
        ["alternate"] => Ok(verdict(if message.attempt == 1 { "first" } else { "second" })),
        // Failures that happen to it.
        ["trap"] => panic!("trapped as told"),
        ["unreachable"] => trap(),
        ["stray"] => {
            stray();
            Ok(verdict("strayed"))
        }
        ["loop"] => loop {
            black_box(());
        },
        ["recurse"] => {
            let depth = recurse(black_box(1));
            Ok(Verdict { reasons: vec![depth.to_string()], ..verdict("recursed") })
        }
        // Uses time, memory or output, then answers: grind ROUNDS of about a millisecond, spin MS, sleep MS, allocate MIB, print TEXT, flood MIB.
        ["spin", duration] => {
            let duration = Duration::from_millis(number(duration, words)?.into());
            let start = Instant::now();
            while start.elapsed() < duration {
                // So long since reading the clock is a call to the host.
                grind();
            }
            Ok(verdict("spun"))
        }
        ["grind", rounds] => {
            (0..number(rounds, words)?).for_each(|_| grind());
            Ok(verdict("ground"))
        }
        ["sleep", duration] => {
            thread::sleep(Duration::from_millis(number(duration, words)?.into()));
            Ok(verdict("slept"))
        }
        // Calls the host for ever: without a pause, or waiting a moment each time.
        ["call"] => loop {
            black_box(Instant::now());
        },
        ["nap"] => loop {
            thread::sleep(Duration::from_nanos(1));
        },
        // Takes memory for ever in pieces, giving none back, or grows it whether it succeeds or not.
        ["hoard"] => loop {
            std::mem::forget(black_box(vec![1_u8; MIB]));
        },
        ["grow"] => loop {
            black_box(grow());
        },
        ["allocate", mebibytes] => {
            let block = vec![1_u8; number(mebibytes, words)? as usize * MIB];
            black_box(&block);
            Ok(verdict("allocated"))
        }
        ["print", text @ ..] => {
            println!("{}", text.join(" "));
            eprintln!("{}", text.join(" "));
            Ok(verdict("printed"))
        }
        ["flood", mebibytes] => {
            let line = [b'x'; 1023].into_iter().chain([b'\n']).collect::<Vec<u8>>();
            let mut output = std::io::stdout().lock();
            for _ in 0..number(mebibytes, words)? as usize * (MIB / line.len()) {
                output.write_all(&line).map_err(|error| Failure::Reject(error.to_string()))?;
            }
            Ok(verdict("flooded"))
        }
        // Asks servers: ask METHOD URL, send URL BYTES, declare URL BYTES, follow URL, together URL N, fields.
        #[cfg(feature = "http")]
        ["ask", method, url] => Ok(asked([requests::ask(method, url)])),
        #[cfg(feature = "http")]
        ["send", url, bytes] => Ok(asked([requests::send(url, number(bytes, words)? as usize, false)])),
        #[cfg(feature = "http")]
        ["declare", url, bytes] => Ok(asked([requests::send(url, number(bytes, words)? as usize, true)])),
        #[cfg(feature = "http")]
        ["follow", url] => {
            let first = requests::ask("GET", url);
            let second = first.as_ref().ok().and_then(|answer| answer.location.as_deref());
            let second = second.map(|location| requests::ask("GET", location));
            Ok(asked([Some(first), second].into_iter().flatten()))
        }
        #[cfg(feature = "http")]
        ["together", url, count] => {
            let begun: Vec<_> = (0..number(count, words)?).map(|_| requests::begin("GET", url)).collect();
            Ok(asked(begun.into_iter().map(|begun| begun.and_then(requests::all))))
        }
        #[cfg(feature = "http")]
        ["fields"] => requests::hoard(),
        // Too much of an answer: reasons N BYTES.
        ["reasons", count, bytes] => {
            let reason = "r".repeat(number(bytes, words)? as usize);
            Ok(Verdict { reasons: vec![reason; number(count, words)? as usize], ..verdict("reasons") })
        }
        _ => Err(unknown(words)),
    }
}

/// What came of requests, as reasons: status, length and beginning of the body, or what went wrong.
#[cfg(feature = "http")]
fn asked(answers: impl IntoIterator<Item = Result<requests::Answer, wasip2::http::types::ErrorCode>>) -> Verdict {
    let told = |answer: Result<requests::Answer, _>| match answer {
        Ok(answer) => {
            let beginning = &answer.body[..answer.body.len().min(100)];
            format!("{} {} {}", answer.status, answer.body.len(), String::from_utf8_lossy(beginning))
        }
        Err(error) => format!("{error:?}").chars().take(200).collect(),
    };
    Verdict { reasons: answers.into_iter().map(told).collect(), ..verdict("asked") }
}

/// Everything the host told the guest about the message, as reasons.
fn echo(message: &Message) -> Verdict {
    let mut reasons = vec![
        message.id.clone(),
        message.subject.clone(),
        message.time.to_string(),
        message.attempt.to_string(),
        message.data.len().to_string(),
    ];
    let headers = message.headers.iter().take(10);
    reasons.extend(headers.map(|(name, value)| format!("{name}={}", String::from_utf8_lossy(value))));
    Verdict { reasons, ..verdict("echo") }
}

/// Asks for another delivery until this attempt, each time after so many milliseconds.
fn not_before(attempt: &str, delay: &str, words: &[&str], message: &Message) -> Result<(), Failure> {
    if message.attempt >= number(attempt, words)? {
        return Ok(());
    }
    Err(Failure::Retry(Retry { after_ms: Some(number(delay, words)?), reason: "not yet".to_owned() }))
}

const MIB: usize = 1024 * 1024;

fn verdict(queue: &str) -> Verdict {
    Verdict {
        priority: Priority::Normal,
        issue: Issue::New("actor".to_owned()),
        queue: queue.to_owned(),
        reasons: vec!["actor".to_owned()],
    }
}

fn priority_of(word: &str) -> Result<Priority, Failure> {
    match word {
        "low" => Ok(Priority::Low),
        "normal" => Ok(Priority::Normal),
        "high" => Ok(Priority::High),
        "urgent" => Ok(Priority::Urgent),
        _ => Err(unknown(&[word])),
    }
}

fn number(word: &str, words: &[&str]) -> Result<u32, Failure> {
    word.parse().map_err(|_| unknown(words))
}

fn unknown(words: &[&str]) -> Failure {
    Failure::Reject(format!("unknown command {:?}", words.join(" ")))
}

fn outcome<T, E: ToString>(result: Result<T, E>) -> String {
    result.map_or_else(|error| error.to_string(), |_| "open".to_owned())
}

/// Computes for about a millisecond.
fn grind() {
    black_box((0..1_000_000_u32).fold(0, |sum: u32, n| sum.wrapping_mul(31).wrapping_add(black_box(n))));
}

/// Uses up the stack. What is done with the result keeps the compiler from making it a loop, and there is hardly
/// anything on the stack that the module keeps in its memory, so that the real one overflows first.
#[expect(unconditional_recursion, reason = "that is what it is for")]
#[inline(never)]
fn recurse(depth: u64) -> u64 {
    recurse(black_box(depth) + 1).rotate_left(1) ^ depth
}

/// Grows the memory by a page.
fn grow() -> usize {
    #[cfg(target_family = "wasm")]
    return core::arch::wasm32::memory_grow::<0>(1);
    #[cfg(not(target_family = "wasm"))]
    std::process::abort();
}

/// The instruction `unreachable`, without a message.
fn trap() -> ! {
    #[cfg(target_family = "wasm")]
    core::arch::wasm32::unreachable();
    #[cfg(not(target_family = "wasm"))]
    std::process::abort();
}

/// Calls a function through a pointer that leads nowhere.
#[inline(never)]
fn stray() {
    // SAFETY: none, the host has to stand it. The pointer is not null, which is all that the compiler may assume, and wasm
    // traps.
    let nowhere = unsafe { std::mem::transmute::<usize, fn()>(black_box(usize::MAX)) };
    nowhere();
}
