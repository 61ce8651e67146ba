//! The debugging face of the triage: the same rules behind HTTP, without any host of ours.
//!
//! ```text
//! wasmtime serve triage-http.wasm
//! curl --data-binary @mail.eml 'http://localhost:8080/?queue.default=support'
//! ```
//!
//! Plain `wasmtime serve` provides no `wasi:config`; the configuration comes from the query string instead, which
//! also lets one try a rule without starting anything again.
//!
//! It is built for `wasm32-unknown-unknown`, as the lean face is. On `wasm32-wasip2` the standard library imports
//! `wasi:cli/environment`, which plain `wasmtime serve` does not provide either.

use std::io;

use guest::{Rules, Verdict};
use serde_json::Value;
use wasip2::exports::http::incoming_handler;
use wasip2::http::types::{
    Fields, IncomingBody, IncomingRequest, Method, OutgoingBody, OutgoingResponse, ResponseOutparam,
};
use wasip2::io::streams::StreamError;

/// No mail is longer than this, in bytes.
const MAIL_MAX_BYTES: usize = 32 * 1024 * 1024;

const USAGE: &str = "\
Triage of one mail: POST it, get its verdict as JSON.

    curl --data-binary @mail.eml http://localhost:8080/

The configuration comes in the query string, percent-encoded:

    curl --data-binary @mail.eml 'http://localhost:8080/?queue.default=support&priority.urgent=fire,on%20fire'

200  the verdict
400  the configuration is wrong
413  the mail is longer than 32 MiB
422  these bytes are no mail
";

struct Http;

wasip2::http::proxy::export!(Http);

impl incoming_handler::Guest for Http {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        let answer = match request.method() {
            Method::Post => decide(&request),
            Method::Get => Answer { status: 200, content_type: TEXT, body: USAGE.to_owned() },
            _ => Answer { status: 405, content_type: TEXT, body: USAGE.to_owned() },
        };
        answer.send(out);
    }
}

const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";

/// What is sent back.
struct Answer {
    status: u16,
    content_type: &'static str,
    body: String,
}

impl Answer {
    /// A JSON value on a line of its own.
    fn json(status: u16, body: &str) -> Answer {
        Answer { status, content_type: JSON, body: format!("{body}\n") }
    }

    fn failure(status: u16, failure: &str, reason: &str) -> Answer {
        let reason = Value::from(reason);
        Answer::json(status, &format!(r#"{{"failure":"{failure}","reason":{reason}}}"#))
    }

    /// Sends the answer. Who asked may be gone, and nobody is left to tell that to.
    fn send(self, out: ResponseOutparam) {
        let fields = Fields::new();
        let mut headers = vec![("content-type", self.content_type)];
        if self.status == 405 {
            headers.push(("allow", "GET, POST"));
        }
        for (name, value) in headers {
            // Neither a forbidden name nor an invalid value is possible here.
            let _ = fields.append(name, value.as_bytes());
        }
        let response = OutgoingResponse::new(fields);
        let _ = response.set_status_code(self.status);
        let body = response.body();
        ResponseOutparam::set(out, Ok(response));
        let Ok(body) = body else { return };
        if let Ok(stream) = body.write() {
            // The stream takes at most 4096 bytes at once.
            for chunk in self.body.as_bytes().chunks(4096) {
                if stream.blocking_write_and_flush(chunk).is_err() {
                    return;
                }
            }
        }
        let _ = OutgoingBody::finish(body, None);
    }
}

fn decide(request: &IncomingRequest) -> Answer {
    let path = request.path_with_query().unwrap_or_default();
    let query = path.split_once('?').map_or("", |(_, query)| query);
    let rules = match Rules::from_config(pairs(query)) {
        Ok(rules) => rules,
        Err(error) => return Answer::failure(400, "retry", &format!("configuration: {error}")),
    };
    let mail = match read(request) {
        Ok(Some(mail)) => mail,
        Ok(None) => return Answer::failure(413, "reject", "the mail is longer than 32 MiB"),
        Err(error) => return Answer::failure(400, "retry", &format!("reading the mail: {error}")),
    };
    match guest::triage(&mail, &rules) {
        Ok(verdict) => Answer::json(200, &to_json(&verdict)),
        Err(reason) => Answer::failure(422, "reject", &reason),
    }
}

/// The verdict as JSON, its fields in the order in which the host writes them.
fn to_json(verdict: &Verdict) -> String {
    let Verdict { priority, issue, queue, reasons } = verdict;
    format!(
        r#"{{"priority":"{}","issue":{{"kind":"{}","id":{}}},"queue":{},"reasons":{}}}"#,
        priority.as_str(),
        issue.kind(),
        Value::from(issue.id()),
        Value::from(queue.as_str()),
        Value::from(reasons.as_slice()),
    )
}

/// The body of the request; none if it is too long.
fn read(request: &IncomingRequest) -> io::Result<Option<Vec<u8>>> {
    let gone = || io::Error::other("the body is gone");
    let body: IncomingBody = request.consume().map_err(|()| gone())?;
    let stream = body.stream().map_err(|()| gone())?;
    let mut mail = Vec::new();
    loop {
        match stream.blocking_read(64 * 1024) {
            Ok(chunk) => mail.extend_from_slice(&chunk),
            Err(StreamError::Closed) => return Ok(Some(mail)),
            Err(StreamError::LastOperationFailed(error)) => return Err(io::Error::other(error.to_debug_string())),
        }
        if mail.len() > MAIL_MAX_BYTES {
            return Ok(None);
        }
    }
}

/// The pairs of a query string.
fn pairs(query: &str) -> impl Iterator<Item = (String, String)> {
    query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decode(key), decode(value))
    })
}

/// Undoes percent-encoding; what is not encoded properly stays as it is.
fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [byte, tail @ ..] = rest {
        let hex = tail.get(..2).and_then(|hex| str::from_utf8(hex).ok());
        let code = hex.filter(|hex| !hex.starts_with('+')).and_then(|hex| u8::from_str_radix(hex, 16).ok());
        let (decoded, length) = match (byte, code) {
            (b'%', Some(code)) => (code, 3),
            (b'+', _) => (b' ', 1),
            _ => (*byte, 1),
        };
        bytes.push(decoded);
        rest = &rest[length..];
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
