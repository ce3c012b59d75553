//! A tokenizer that does not panic: the part of `tokenizers::Tokenizer` that daulet's source uses.

use std::any::Any;
use std::cell::RefCell;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::Path;
use std::sync::Once;

use hf::tokenizer::{Encoding, TruncationParams};

thread_local! {
    static PLACE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Runs `f`; a panic becomes an error that says where it happened. NUL bytes are taken out of
/// messages, since daulet's source unwraps `CString::new(message)`.
pub fn guarded<T>(f: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    static QUIET: Once = Once::new();
    // Rust's own hook prints to stderr; ours keeps the place for the message instead. The hook is
    // this library's alone: its copy of std is private to it.
    QUIET.call_once(|| {
        std::panic::set_hook(Box::new(|info| {
            let place = info.location().map(|l| format!("{}:{}", l.file(), l.line()));
            PLACE.with(|p| *p.borrow_mut() = place.unwrap_or_default());
        }))
    });
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(message)) => Err(message.replace('\0', "\\0")),
        Err(payload) => {
            let place = PLACE.with(|p| p.borrow().clone());
            Err(format!("panic at {place}: {}", reason(payload.as_ref())).replace('\0', "\\0"))
        }
    }
}

fn reason(payload: &(dyn Any + Send)) -> String {
    if let Some(s) = payload.downcast_ref::<&str>() {
        return s.to_string();
    }
    payload.downcast_ref::<String>().cloned().unwrap_or_else(|| "unknown".into())
}

/// The guarded tokenizer. Truncation and padding stored in the file are switched off when it is
/// opened: the caller decides them per call, as in transformers.
#[derive(Clone)]
pub struct Tokenizer(pub hf::Tokenizer);

impl Tokenizer {
    pub fn from_bytes(bytes: impl AsRef<[u8]>) -> Result<Self, String> {
        guarded(|| {
            let mut inner = hf::Tokenizer::from_bytes(bytes).map_err(|e| e.to_string())?;
            inner.with_truncation(None).map_err(|e| e.to_string())?;
            inner.with_padding(None);
            Ok(Self(inner))
        })
    }

    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, String> {
        let bytes = std::fs::read(path).map_err(|e| e.to_string())?;
        Self::from_bytes(bytes)
    }

    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Encoding, String> {
        guarded(|| self.0.encode(text, add_special_tokens).map_err(|e| e.to_string()))
    }

    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, String> {
        guarded(|| self.0.decode(ids, skip_special_tokens).map_err(|e| e.to_string()))
    }

    pub fn get_vocab_size(&self, with_added_tokens: bool) -> usize {
        self.0.get_vocab_size(with_added_tokens)
    }

    pub fn set_encode_special_tokens(&mut self, value: bool) {
        self.0.set_encode_special_tokens(value);
    }

    pub fn with_truncation(&mut self, params: Option<TruncationParams>) -> Result<&mut Self, String> {
        guarded(|| self.0.with_truncation(params).map(|_| ()).map_err(|e| e.to_string()))?;
        Ok(self)
    }
}
