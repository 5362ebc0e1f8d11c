//! Memory for key material: locked into RAM where the limits allow it, left out of core dumps, and
//! overwritten when it is let go.
//!
//! Invariants. A slot is zero whenever nobody owns it. Moving a `Guarded` moves a pointer: the value
//! stays in its slot and leaves no copy behind. What making the value left on the stack is the
//! maker's to overwrite, with `burn_stack`.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{LazyLock, Once};

use parking_lot::Mutex;
use zeroize::Zeroize;

const CHUNK: usize = 64 << 10;
const SMALLEST: usize = 32;
const LARGEST: usize = 4096;
/// More than any derivation or key expansion here takes of the stack.
const BURN: usize = 12 << 10;

/// Free slots by size. Chunks are never given back: a node's keys come and go at about one number.
#[derive(Default)]
struct Slots(HashMap<usize, Vec<NonNull<u8>>>);

// SAFETY: the pointers are to memory that only the owner of the slot uses.
unsafe impl Send for Slots {}

static SLOTS: LazyLock<Mutex<Slots>> = LazyLock::new(Mutex::default);

/// Maps `CHUNK` bytes of zeros, locked and left out of dumps.
fn chunk() -> NonNull<u8> {
    // SAFETY: an anonymous private mapping of our own; the calls on it change no other memory.
    let (at, locked) = unsafe {
        let at = libc::mmap(
            std::ptr::null_mut(),
            CHUNK,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        assert!(at != libc::MAP_FAILED, "the kernel has no memory for keys");
        libc::madvise(at, CHUNK, libc::MADV_DONTDUMP);
        libc::madvise(at, CHUNK, libc::MADV_DONTFORK);
        (at, libc::mlock(at, CHUNK) == 0)
    };
    static SAID: Once = Once::new();
    if !locked {
        SAID.call_once(|| {
            tracing::warn!("keys cannot be locked into memory and may reach swap: raise RLIMIT_MEMLOCK (LimitMEMLOCK= in the unit), or run without swap");
        });
    }
    NonNull::new(at.cast()).expect("mmap answers an address")
}

impl Slots {
    fn take(&mut self, size: usize) -> NonNull<u8> {
        let free = self.0.entry(size).or_default();
        if free.is_empty() {
            let start = chunk();
            // SAFETY: offsets inside the chunk.
            free.extend((0..CHUNK / size).map(|n| unsafe { start.add(n * size) }));
        }
        free.pop().expect("a chunk has slots")
    }
}

/// A value in guarded memory.
pub struct Guarded<T> {
    value: NonNull<T>,
}

// SAFETY: owns its value, as a Box does.
unsafe impl<T: Send> Send for Guarded<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Guarded<T> {}

impl<T> Guarded<T> {
    /// A slot is a power of two, so that it is aligned to its size.
    const SIZE: usize = {
        let size = size_of::<T>().next_power_of_two();
        assert!(size <= LARGEST && align_of::<T>() <= SMALLEST);
        if size < SMALLEST { SMALLEST } else { size }
    };

    /// Makes the value, and overwrites what that left on the stack.
    pub fn new(make: impl FnOnce() -> T) -> Self {
        let value = SLOTS.lock().take(Self::SIZE).cast::<T>();
        fill(value, make);
        burn_stack();
        Guarded { value }
    }

    /// Gives the value away as an address, for C; `from_raw` takes it back.
    pub fn into_raw(self) -> *mut T {
        let value = self.value.as_ptr();
        std::mem::forget(self);
        value
    }

    /// # Safety
    /// `value` is from `into_raw`, once.
    pub unsafe fn from_raw(value: *mut T) -> Self {
        Guarded {
            value: NonNull::new(value).expect("into_raw gives an address"),
        }
    }
}

/// In a frame of its own, below the one that burns the stack.
#[inline(never)]
fn fill<T>(slot: NonNull<T>, make: impl FnOnce() -> T) {
    // SAFETY: the slot is the caller's, large enough, aligned, and holds no value yet.
    unsafe { slot.write(make()) };
}

impl<T> Deref for Guarded<T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the value lives as long as its owner.
        unsafe { self.value.as_ref() }
    }
}

impl<T> DerefMut for Guarded<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above, and borrowed mutably.
        unsafe { self.value.as_mut() }
    }
}

impl<T> Drop for Guarded<T> {
    fn drop(&mut self) {
        let slot = self.value.cast::<u8>();
        // SAFETY: the value is dropped once, then its whole slot is ours to overwrite.
        unsafe {
            self.value.drop_in_place();
            std::slice::from_raw_parts_mut(slot.as_ptr(), Self::SIZE).zeroize();
        }
        let mut slots = SLOTS.lock();
        slots.0.entry(Self::SIZE).or_default().push(slot);
    }
}

/// Overwrites the stack below the caller, where functions that have returned left copies of keys.
#[inline(never)]
pub fn burn_stack() {
    let mut below = [0u8; BURN];
    below.zeroize();
    std::hint::black_box(&mut below);
}

/// From here on no core dump of this process is written, and nobody but root reads its memory.
/// Answers whether the kernel agrees.
pub fn forbid_dumps() -> bool {
    // SAFETY: changes an attribute of this process only.
    let done = unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) };
    done == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_zero_after_use() {
        let mut one = Guarded::new(|| [0u8; 32]);
        one.copy_from_slice(&[7; 32]);
        let at = one.value.as_ptr();
        // In this process's own memory, as another would read it.
        let read = || {
            let mut found = [0u8; 32];
            let memory = std::fs::File::open("/proc/self/mem").unwrap();
            std::os::unix::fs::FileExt::read_exact_at(&memory, &mut found, at as u64).unwrap();
            found
        };
        assert_eq!(read(), [7; 32]);
        drop(one);
        assert_eq!(read(), [0; 32]);
    }

    #[test]
    fn values_do_not_overlap() {
        let all: Vec<_> = (0..5000u32).map(|n| Guarded::new(|| [n; 100])).collect();
        for (n, one) in all.iter().enumerate() {
            assert_eq!(**one, [n as u32; 100]);
        }
    }
}
