//! What daulet's C functions lack, over the same tokenizer objects: texts with NUL bytes, errors
//! instead of empty results, offsets in characters, tokens and ids both ways, added tokens.
//!
//! `engine/token/nngtok.h` is the manual of these functions. Each takes the pointer that
//! `tokenizers_from_bytes` gave. Bytes handed out are freed with `nngtok_free`. Numbers in them are
//! u32 in the machine's byte order. No panic leaves a function: it becomes an error.

use std::slice;

use hf::tokenizer::{AddedToken, EncodeInput, Encoding};
use hf::PostProcessorWrapper;
use serde_json::json;

use crate::guard::guarded;
use crate::UnifiedTokenizer;

/// Bytes owned by the caller; `ptr` is null where `len` is 0.
#[repr(C)]
pub struct NngtokBytes {
    ptr: *mut u8,
    len: usize,
}

/// In place of a token's length: there is no token of that id.
const NONE: u32 = u32::MAX;

/// Writes bytes into an out-parameter.
///
/// # Safety
/// `out` is null or valid for one write.
unsafe fn put(out: *mut NngtokBytes, bytes: Vec<u8>) {
    if out.is_null() {
        return;
    }
    let len = bytes.len();
    let ptr = if len == 0 { std::ptr::null_mut() } else { Box::into_raw(bytes.into_boxed_slice()).cast() };
    out.write(NngtokBytes { ptr, len });
}

/// A slice of what C passed; null is the empty slice.
///
/// # Safety
/// `ptr` is null or valid for `len` reads while the slice lives.
unsafe fn view<'a, T>(ptr: *const T, len: usize) -> &'a [T] {
    if ptr.is_null() || len == 0 {
        &[]
    } else {
        slice::from_raw_parts(ptr, len)
    }
}

fn text(bytes: &[u8]) -> Result<&str, String> {
    std::str::from_utf8(bytes).map_err(|e| format!("the text is not UTF-8 (byte {})", e.valid_up_to()))
}

/// Runs `f` on the tokenizer behind `tok`; 0 and `out`, or 1 and `err`.
///
/// # Safety
/// `tok` came from `tokenizers_from_bytes` and was not freed; `out` and `err` are writable or null.
unsafe fn run(
    tok: *const UnifiedTokenizer,
    out: *mut NngtokBytes,
    err: *mut NngtokBytes,
    f: impl FnOnce(&hf::Tokenizer) -> Result<Vec<u8>, String>,
) -> i32 {
    let result = guarded(|| match tok.as_ref() {
        Some(UnifiedTokenizer::HuggingFace(t)) => f(&t.0),
        Some(_) => Err("not a tokenizer.json tokenizer".into()),
        None => Err("null tokenizer".into()),
    });
    finish(result, out, err)
}

/// As `run`, for a change of the tokenizer, which nothing else may be using.
///
/// # Safety
/// As for `run`.
unsafe fn change(
    tok: *mut UnifiedTokenizer,
    err: *mut NngtokBytes,
    f: impl FnOnce(&mut hf::Tokenizer) -> Result<(), String>,
) -> i32 {
    let result = guarded(|| match tok.as_mut() {
        Some(UnifiedTokenizer::HuggingFace(t)) => f(&mut t.0).map(|()| Vec::new()),
        Some(_) => Err("not a tokenizer.json tokenizer".into()),
        None => Err("null tokenizer".into()),
    });
    finish(result, std::ptr::null_mut(), err)
}

unsafe fn finish(result: Result<Vec<u8>, String>, out: *mut NngtokBytes, err: *mut NngtokBytes) -> i32 {
    match result {
        Ok(bytes) => {
            put(out, bytes);
            0
        }
        Err(message) => {
            put(err, message.into_bytes());
            1
        }
    }
}

fn push(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_ne_bytes());
}

fn length(n: usize) -> Result<u32, String> {
    match u32::try_from(n) {
        Ok(v) if v != NONE => Ok(v),
        _ => Err(format!("{n} is too long")),
    }
}

/// Strings as their lengths, then their bytes.
fn push_strings<'a>(out: &mut Vec<u8>, strings: impl Iterator<Item = Option<&'a str>> + Clone) -> Result<(), String> {
    for s in strings.clone() {
        push(out, s.map_or(Ok(NONE), |s| length(s.len()))?);
    }
    strings.flatten().for_each(|s| out.extend_from_slice(s.as_bytes()));
    Ok(())
}

fn pack(e: &Encoding) -> Result<Vec<u8>, String> {
    let n = e.len();
    let mut out = Vec::with_capacity(4 + n * 28);
    push(&mut out, length(n)?);
    for column in [e.get_ids(), e.get_type_ids(), e.get_special_tokens_mask()] {
        column.iter().for_each(|v| push(&mut out, *v));
    }
    for (start, end) in e.get_offsets() {
        push(&mut out, length(*start)?);
        push(&mut out, length(*end)?);
    }
    push_strings(&mut out, e.get_tokens().iter().map(|t| Some(t.as_str())))?;
    Ok(out)
}

/// # Safety
/// See the header.
#[no_mangle]
pub unsafe extern "C" fn nngtok_encode(
    tok: *const UnifiedTokenizer,
    first: *const u8,
    first_len: usize,
    second: *const u8,
    second_len: usize,
    pair: bool,
    add_special: bool,
    out: *mut NngtokBytes,
    err: *mut NngtokBytes,
) -> i32 {
    run(tok, out, err, |t| {
        let a = text(view(first, first_len))?;
        let input: EncodeInput = if pair { (a, text(view(second, second_len))?).into() } else { a.into() };
        pack(&t.encode_char_offsets(input, add_special).map_err(|e| e.to_string())?)
    })
}

/// # Safety
/// See the header.
#[no_mangle]
pub unsafe extern "C" fn nngtok_ids(
    tok: *const UnifiedTokenizer,
    bytes: *const u8,
    len: usize,
    add_special: bool,
    out: *mut NngtokBytes,
    err: *mut NngtokBytes,
) -> i32 {
    run(tok, out, err, |t| {
        let e = t.encode_fast(text(view(bytes, len))?, add_special).map_err(|e| e.to_string())?;
        Ok(e.get_ids().iter().flat_map(|id| i64::from(*id).to_ne_bytes()).collect())
    })
}

/// # Safety
/// See the header.
#[no_mangle]
pub unsafe extern "C" fn nngtok_decode(
    tok: *const UnifiedTokenizer,
    ids: *const u32,
    n: usize,
    skip_special: bool,
    out: *mut NngtokBytes,
    err: *mut NngtokBytes,
) -> i32 {
    run(tok, out, err, |t| Ok(t.decode(view(ids, n), skip_special).map_err(|e| e.to_string())?.into_bytes()))
}

/// # Safety
/// See the header.
#[no_mangle]
pub unsafe extern "C" fn nngtok_tokens(
    tok: *const UnifiedTokenizer,
    ids: *const u32,
    n: usize,
    out: *mut NngtokBytes,
    err: *mut NngtokBytes,
) -> i32 {
    run(tok, out, err, |t| {
        let tokens: Vec<Option<String>> = view(ids, n).iter().map(|id| t.id_to_token(*id)).collect();
        let mut bytes = Vec::new();
        push_strings(&mut bytes, tokens.iter().map(|t| t.as_deref()))?;
        Ok(bytes)
    })
}

/// # Safety
/// See the header.
#[no_mangle]
pub unsafe extern "C" fn nngtok_lookup(
    tok: *const UnifiedTokenizer,
    token: *const u8,
    len: usize,
    id: *mut i64,
    err: *mut NngtokBytes,
) -> i32 {
    run(tok, std::ptr::null_mut(), err, |t| {
        let found = t.token_to_id(text(view(token, len))?);
        id.write(found.map_or(-1, i64::from));
        Ok(Vec::new())
    })
}

/// # Safety
/// See the header.
#[no_mangle]
pub unsafe extern "C" fn nngtok_vocab(
    tok: *const UnifiedTokenizer,
    out: *mut NngtokBytes,
    err: *mut NngtokBytes,
) -> i32 {
    run(tok, out, err, |t| {
        let mut entries: Vec<(String, u32)> = t.get_vocab(true).into_iter().collect();
        entries.sort_by(|a, b| (a.1, &a.0).cmp(&(b.1, &b.0)));
        let mut bytes = Vec::with_capacity(4 + entries.len() * 16);
        push(&mut bytes, length(entries.len())?);
        entries.iter().for_each(|(_, id)| push(&mut bytes, *id));
        push_strings(&mut bytes, entries.iter().map(|(token, _)| Some(token.as_str())))?;
        Ok(bytes)
    })
}

/// # Safety
/// See the header.
#[no_mangle]
pub unsafe extern "C" fn nngtok_describe(
    tok: *const UnifiedTokenizer,
    out: *mut NngtokBytes,
    err: *mut NngtokBytes,
) -> i32 {
    use hf::{ModelWrapper, PostProcessor};
    run(tok, out, err, |t| {
        let mut added: Vec<(u32, AddedToken)> = t.get_added_tokens_decoder().into_iter().collect();
        added.sort_by_key(|(id, _)| *id);
        let model = match t.get_model() {
            ModelWrapper::BPE(_) => "BPE",
            ModelWrapper::WordPiece(_) => "WordPiece",
            ModelWrapper::WordLevel(_) => "WordLevel",
            ModelWrapper::Unigram(_) => "Unigram",
        };
        let described = json!({
            "model": model,
            "vocab_size": t.get_vocab_size(false),
            "len": t.get_vocab_size(true),
            "post_processor": t.get_post_processor().is_some(),
            "adds": t.get_post_processor().map_or(0, |p| p.added_tokens(false)),
            "added": added.iter().map(|(id, a)| json!({
                "id": id, "content": a.content, "single_word": a.single_word, "lstrip": a.lstrip,
                "rstrip": a.rstrip, "normalized": a.normalized, "special": a.special,
            })).collect::<Vec<_>>(),
        });
        serde_json::to_vec(&described).map_err(|e| e.to_string())
    })
}

/// # Safety
/// See the header.
#[no_mangle]
pub unsafe extern "C" fn nngtok_add_tokens(
    tok: *mut UnifiedTokenizer,
    json: *const u8,
    len: usize,
    err: *mut NngtokBytes,
) -> i32 {
    change(tok, err, |t| {
        let tokens: Vec<AddedToken> = serde_json::from_slice(view(json, len)).map_err(|e| e.to_string())?;
        t.add_tokens(tokens).map(|_| ()).map_err(|e| e.to_string())
    })
}

/// # Safety
/// See the header.
#[no_mangle]
pub unsafe extern "C" fn nngtok_post_processor(
    tok: *mut UnifiedTokenizer,
    json: *const u8,
    len: usize,
    err: *mut NngtokBytes,
) -> i32 {
    change(tok, err, |t| {
        let p: PostProcessorWrapper = serde_json::from_slice(view(json, len)).map_err(|e| e.to_string())?;
        t.with_post_processor(Some(p));
        Ok(())
    })
}

/// # Safety
/// See the header.
#[no_mangle]
pub unsafe extern "C" fn nngtok_free(bytes: *mut NngtokBytes) {
    if let Some(b) = bytes.as_mut() {
        if !b.ptr.is_null() {
            drop(Box::from_raw(std::ptr::slice_from_raw_parts_mut(b.ptr, b.len)));
        }
        b.ptr = std::ptr::null_mut();
        b.len = 0;
    }
}

/// Panics inside the guard, so that a test can see that nothing escapes.
///
/// # Safety
/// See the header.
#[no_mangle]
pub unsafe extern "C" fn nngtok_test_panic(err: *mut NngtokBytes) -> i32 {
    let result = guarded(|| -> Result<Vec<u8>, String> { panic!("on purpose, with a NUL: \0") });
    finish(result, std::ptr::null_mut(), err)
}
