//! Requests to servers, for the guest `caller`.

use wasip2::http::outgoing_handler::handle;
use wasip2::http::types::{
    ErrorCode, Fields, FutureIncomingResponse, IncomingResponse, Method, OutgoingBody, OutgoingRequest, Scheme,
    http_error_code,
};
use wasip2::io::streams::{InputStream, StreamError};

/// What is written into a body at a time.
const CHUNK_BYTES: usize = 4096;

/// What came of a request, up to the end of its body.
pub struct Answer {
    pub status: u16,
    /// Where a redirect leads to.
    pub location: Option<String>,
    pub body: Vec<u8>,
}

/// Asks and waits for all of the answer.
pub fn ask(method: &str, url: &str) -> Result<Answer, ErrorCode> {
    all(begin(method, url)?)
}

/// Sends `bytes` bytes, and says before how many it will be if `declared`.
pub fn send(url: &str, bytes: usize, declared: bool) -> Result<Answer, ErrorCode> {
    let fields = Fields::new();
    if declared {
        fields.append("content-length", bytes.to_string().as_bytes()).map_err(internal)?;
    }
    let request = request(fields, "POST", url)?;
    let body = request.body().map_err(internal)?;
    let answer = handle(request, None)?;
    let stream = body.write().map_err(internal)?;
    for start in (0..bytes).step_by(CHUNK_BYTES) {
        let chunk = [b'x'; CHUNK_BYTES];
        // What is wrong then, the answer says.
        if stream.blocking_write_and_flush(&chunk[..CHUNK_BYTES.min(bytes - start)]).is_err() {
            break;
        }
    }
    drop(stream);
    let _ = OutgoingBody::finish(body, None);
    all(answer)
}

/// Begins a request without waiting for anything.
pub fn begin(method: &str, url: &str) -> Result<FutureIncomingResponse, ErrorCode> {
    handle(request(Fields::new(), method, url)?, None)
}

/// Waits for the answer and reads it to its end.
pub fn all(answer: FutureIncomingResponse) -> Result<Answer, ErrorCode> {
    let response = head(&answer)?;
    let location = response.headers().get("location").into_iter().next();
    let location = location.map(|location| String::from_utf8_lossy(&location).into_owned());
    let status = response.status();
    let body = response.consume().map_err(internal)?;
    let body = read(&body.stream().map_err(internal)?)?;
    Ok(Answer { status, location, body })
}

fn head(answer: &FutureIncomingResponse) -> Result<IncomingResponse, ErrorCode> {
    answer.subscribe().block();
    match answer.get() {
        Some(Ok(answer)) => answer,
        Some(Err(())) | None => Err(internal("no answer")),
    }
}

fn read(stream: &InputStream) -> Result<Vec<u8>, ErrorCode> {
    let mut body = Vec::new();
    loop {
        match stream.blocking_read(CHUNK_BYTES as u64) {
            Ok(piece) => body.extend(piece),
            Err(StreamError::Closed) => return Ok(body),
            Err(StreamError::LastOperationFailed(error)) => {
                return Err(http_error_code(&error).unwrap_or_else(|| internal(error.to_debug_string())));
            }
        }
    }
}

fn request(fields: Fields, method: &str, url: &str) -> Result<OutgoingRequest, ErrorCode> {
    let (scheme, rest) = url.split_once("://").ok_or(ErrorCode::HttpRequestUriInvalid)?;
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let scheme = match scheme {
        "http" => Scheme::Http,
        "https" => Scheme::Https,
        other => Scheme::Other(other.to_owned()),
    };
    let method = match method {
        "GET" => Method::Get,
        "POST" => Method::Post,
        "CONNECT" => Method::Connect,
        other => Method::Other(other.to_owned()),
    };
    let request = OutgoingRequest::new(fields);
    let set = request
        .set_method(&method)
        .and_then(|()| request.set_scheme(Some(&scheme)))
        .and_then(|()| request.set_authority(Some(authority)))
        .and_then(|()| request.set_path_with_query(Some(path)));
    set.map(|()| request).map_err(|()| ErrorCode::HttpRequestUriInvalid)
}

/// Something that should not happen here.
fn internal(what: impl std::fmt::Debug) -> ErrorCode {
    ErrorCode::InternalError(Some(format!("{what:?}")))
}

/// Takes as many header sections of 32 KiB as it is given, for ever.
pub fn hoard() -> ! {
    loop {
        let fields = Fields::new();
        let _ = fields.append("x", &[b'x'; 32 << 10]);
        std::mem::forget(fields);
    }
}
