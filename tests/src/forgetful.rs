//! A filesystem in memory that keeps apart what was synced from what was not: `forget` leaves what a
//! power failure would. Strict: a file's content is there once the file was synced, its name once
//! the directory was. Syncs can be held back, below one directory of the root.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use fuser::{
    BackgroundSession, FileAttr, FileType, Filesystem, MountOption, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request,
    TimeOrNow,
};
use parking_lot::Mutex;

/// Nothing is cached: `forget` changes files behind the kernel's back.
const TTL: Duration = Duration::ZERO;
const ROOT: u64 = 1;
const RENAME_NOREPLACE: u32 = 1;

enum Content {
    File {
        bytes: Vec<u8>,
        /// What writes since the last sync replaced, oldest first: length, offset, bytes.
        undo: Vec<(usize, usize, Vec<u8>)>,
    },
    Dir {
        names: BTreeMap<OsString, u64>,
        synced: BTreeMap<OsString, u64>,
    },
}

struct Inode {
    content: Content,
    perm: u16,
    links: u32,
    /// The directory of the root that it was made below.
    top: OsString,
}

struct Held {
    reply: ReplyEmpty,
    ino: u64,
}

#[derive(Default)]
struct State {
    inodes: HashMap<u64, Inode>,
    next: u64,
    hold: Option<OsString>,
    held: Vec<Held>,
}

impl State {
    fn names(&mut self, ino: u64) -> Option<&mut BTreeMap<OsString, u64>> {
        match &mut self.inodes.get_mut(&ino)?.content {
            Content::Dir { names, .. } => Some(names),
            Content::File { .. } => None,
        }
    }

    fn find(&mut self, parent: u64, name: &OsStr) -> Result<u64, i32> {
        let names = self.names(parent).ok_or(libc::ENOTDIR)?;
        names.get(name).copied().ok_or(libc::ENOENT)
    }

    fn make(&mut self, parent: u64, name: &OsStr, content: Content, mode: u32) -> Result<u64, i32> {
        if self.find(parent, name).is_ok() {
            return Err(libc::EEXIST);
        }
        self.next += 1;
        let ino = self.next;
        let top = match parent {
            ROOT => name.to_os_string(),
            _ => self.inodes[&parent].top.clone(),
        };
        let inode = Inode {
            content,
            perm: (mode & 0o7777) as u16,
            links: 1,
            top,
        };
        self.inodes.insert(ino, inode);
        self.names(parent)
            .ok_or(libc::ENOTDIR)?
            .insert(name.into(), ino);
        Ok(ino)
    }

    fn remove(&mut self, parent: u64, name: &OsStr) -> Result<(), i32> {
        let ino = self.find(parent, name)?;
        self.names(parent).ok_or(libc::ENOTDIR)?.remove(name);
        // The inode stays: a synced name may still lead to it.
        if let Some(inode) = self.inodes.get_mut(&ino) {
            inode.links = inode.links.saturating_sub(1);
        }
        Ok(())
    }

    fn attr(&self, ino: u64) -> Result<FileAttr, i32> {
        let inode = self.inodes.get(&ino).ok_or(libc::ENOENT)?;
        let (kind, size) = match &inode.content {
            Content::File { bytes, .. } => (FileType::RegularFile, bytes.len() as u64),
            Content::Dir { .. } => (FileType::Directory, 0),
        };
        Ok(FileAttr {
            ino,
            size,
            blocks: size.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm: inode.perm,
            nlink: inode.links.max(1),
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    fn sync(&mut self, ino: u64) {
        match self.inodes.get_mut(&ino).map(|inode| &mut inode.content) {
            Some(Content::File { undo, .. }) => undo.clear(),
            Some(Content::Dir { names, synced }) => *synced = names.clone(),
            None => {}
        }
    }

    /// Puts `data` at `at`, or cuts the file to `at` where there is none.
    fn change(&mut self, ino: u64, at: usize, data: Option<&[u8]>) -> Result<(), i32> {
        let inode = self.inodes.get_mut(&ino).ok_or(libc::ENOENT)?;
        let Content::File { bytes, undo } = &mut inode.content else {
            return Err(libc::EISDIR);
        };
        let length = bytes.len();
        let end = data.map_or(length.max(at), |data| at + data.len());
        undo.push((length, at, bytes[at.min(length)..end.min(length)].to_vec()));
        match data {
            Some(data) => {
                bytes.resize(length.max(end), 0);
                bytes[at..end].copy_from_slice(data);
            }
            None => bytes.resize(at, 0),
        }
        Ok(())
    }

    fn forget(&mut self, top: Option<&str>) {
        let gone = |inode: &&mut Inode| top.is_none_or(|top| inode.top == *top);
        for inode in self.inodes.values_mut().filter(gone) {
            match &mut inode.content {
                Content::File { bytes, undo } => {
                    for (length, at, old) in undo.drain(..).rev() {
                        bytes.resize(length, 0);
                        let at = at.min(length);
                        bytes[at..at + old.len()].copy_from_slice(&old);
                    }
                }
                Content::Dir { names, synced } => *names = synced.clone(),
            }
        }
    }
}

/// The mounted filesystem; dropped, it is unmounted.
pub struct Forgetful {
    state: Arc<Mutex<State>>,
    _session: BackgroundSession,
}

impl Forgetful {
    pub fn mount(at: &Path) -> Result<Self> {
        let root = Inode {
            content: Content::Dir {
                names: BTreeMap::new(),
                synced: BTreeMap::new(),
            },
            perm: 0o755,
            links: 1,
            top: OsString::new(),
        };
        let state = Arc::new(Mutex::new(State {
            inodes: HashMap::from([(ROOT, root)]),
            next: ROOT,
            ..State::default()
        }));
        let options = [MountOption::FSName("forgetful".into())];
        let session = fuser::spawn_mount2(Mounted(state.clone()), at, &options);
        Ok(Forgetful {
            state,
            _session: session.context("mounting a filesystem of our own (needs /dev/fuse)")?,
        })
    }

    /// What a power failure leaves: everything that was not synced is gone, below one directory of
    /// the root or everywhere.
    pub fn forget(&self, top: Option<&str>) {
        self.state.lock().forget(top);
    }

    /// Holds back every sync below `top`, a directory of the root.
    pub fn hold(&self, top: &str) {
        self.state.lock().hold = Some(top.into());
    }

    /// How many syncs are held back.
    pub fn held(&self) -> usize {
        self.state.lock().held.len()
    }

    /// Fails the syncs that are held back, and holds no more: nothing of theirs is durable.
    pub fn fail_held(&self) {
        let mut state = self.state.lock();
        state.hold = None;
        for held in state.held.drain(..) {
            held.reply.error(libc::EIO);
        }
    }

    /// Completes the syncs that are held back, and holds no more.
    pub fn release_held(&self) {
        let mut state = self.state.lock();
        state.hold = None;
        let held: Vec<Held> = state.held.drain(..).collect();
        for held in held {
            state.sync(held.ino);
            held.reply.ok();
        }
    }
}

struct Mounted(Arc<Mutex<State>>);

impl Mounted {
    fn entry(&self, made: Result<u64, i32>, reply: ReplyEntry) {
        match made.and_then(|ino| self.0.lock().attr(ino)) {
            Ok(attr) => reply.entry(&TTL, &attr, 0),
            Err(e) => reply.error(e),
        }
    }

    fn done(done: Result<(), i32>, reply: ReplyEmpty) {
        match done {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(e),
        }
    }

    fn synced(&self, ino: u64, reply: ReplyEmpty) {
        let mut state = self.0.lock();
        let top = state.inodes.get(&ino).map(|inode| inode.top.clone());
        if state.hold.is_some() && state.hold == top {
            state.held.push(Held { reply, ino });
            return;
        }
        state.sync(ino);
        reply.ok();
    }
}

fn file() -> Content {
    Content::File {
        bytes: Vec::new(),
        undo: Vec::new(),
    }
}

impl Filesystem for Mounted {
    fn lookup(&mut self, _: &Request<'_>, parent: u64, name: &OsStr, reply: ReplyEntry) {
        let found = self.0.lock().find(parent, name);
        self.entry(found, reply);
    }

    fn getattr(&mut self, _: &Request<'_>, ino: u64, _: Option<u64>, reply: ReplyAttr) {
        match self.0.lock().attr(ino) {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(e) => reply.error(e),
        }
    }

    fn setattr(
        &mut self,
        _: &Request<'_>,
        ino: u64,
        mode: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<u64>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<u32>,
        reply: ReplyAttr,
    ) {
        let mut state = self.0.lock();
        if let (Some(mode), Some(inode)) = (mode, state.inodes.get_mut(&ino)) {
            inode.perm = (mode & 0o7777) as u16;
        }
        let changed = size.map_or(Ok(()), |size| state.change(ino, size as usize, None));
        match changed.and_then(|()| state.attr(ino)) {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(e) => reply.error(e),
        }
    }

    fn mkdir(
        &mut self,
        _: &Request<'_>,
        parent: u64,
        name: &OsStr,
        mode: u32,
        _: u32,
        reply: ReplyEntry,
    ) {
        let dir = Content::Dir {
            names: BTreeMap::new(),
            synced: BTreeMap::new(),
        };
        let made = self.0.lock().make(parent, name, dir, mode);
        self.entry(made, reply);
    }

    fn create(
        &mut self,
        _: &Request<'_>,
        parent: u64,
        name: &OsStr,
        mode: u32,
        _: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        let mut state = self.0.lock();
        let made = state.make(parent, name, file(), mode);
        match made.and_then(|ino| state.attr(ino)) {
            Ok(attr) => reply.created(&TTL, &attr, 0, 0, fuser::consts::FOPEN_DIRECT_IO),
            Err(e) => reply.error(e),
        }
    }

    fn unlink(&mut self, _: &Request<'_>, parent: u64, name: &OsStr, reply: ReplyEmpty) {
        Self::done(self.0.lock().remove(parent, name), reply);
    }

    fn rmdir(&mut self, _: &Request<'_>, parent: u64, name: &OsStr, reply: ReplyEmpty) {
        let mut state = self.0.lock();
        let empty = state.find(parent, name).and_then(|ino| {
            let names = state.names(ino).ok_or(libc::ENOTDIR)?;
            names.is_empty().then_some(()).ok_or(libc::ENOTEMPTY)
        });
        Self::done(empty.and_then(|()| state.remove(parent, name)), reply);
    }

    fn rename(
        &mut self,
        _: &Request<'_>,
        parent: u64,
        name: &OsStr,
        to: u64,
        to_name: &OsStr,
        flags: u32,
        reply: ReplyEmpty,
    ) {
        let mut state = self.0.lock();
        let moved = state.find(parent, name).and_then(|ino| {
            let there = state.find(to, to_name).is_ok();
            if there && flags & RENAME_NOREPLACE != 0 {
                return Err(libc::EEXIST);
            }
            if there {
                state.remove(to, to_name)?;
            }
            state.names(parent).ok_or(libc::ENOTDIR)?.remove(name);
            let names = state.names(to).ok_or(libc::ENOTDIR)?;
            names.insert(to_name.into(), ino);
            Ok(())
        });
        Self::done(moved, reply);
    }

    fn link(&mut self, _: &Request<'_>, ino: u64, to: u64, name: &OsStr, reply: ReplyEntry) {
        let mut state = self.0.lock();
        let linked = match state.find(to, name) {
            Ok(_) => Err(libc::EEXIST),
            Err(_) => state.names(to).ok_or(libc::ENOTDIR).map(|names| {
                names.insert(name.into(), ino);
                ino
            }),
        };
        if let (Ok(_), Some(inode)) = (linked, state.inodes.get_mut(&ino)) {
            inode.links += 1;
        }
        drop(state);
        self.entry(linked, reply);
    }

    fn open(&mut self, _: &Request<'_>, _: u64, _: i32, reply: ReplyOpen) {
        reply.opened(0, fuser::consts::FOPEN_DIRECT_IO);
    }

    fn read(
        &mut self,
        _: &Request<'_>,
        ino: u64,
        _: u64,
        offset: i64,
        size: u32,
        _: i32,
        _: Option<u64>,
        reply: ReplyData,
    ) {
        let state = self.0.lock();
        match state.inodes.get(&ino).map(|inode| &inode.content) {
            Some(Content::File { bytes, .. }) => {
                let from = (offset as usize).min(bytes.len());
                reply.data(&bytes[from..(from + size as usize).min(bytes.len())]);
            }
            _ => reply.error(libc::EISDIR),
        }
    }

    fn write(
        &mut self,
        _: &Request<'_>,
        ino: u64,
        _: u64,
        offset: i64,
        data: &[u8],
        _: u32,
        _: i32,
        _: Option<u64>,
        reply: ReplyWrite,
    ) {
        match self.0.lock().change(ino, offset as usize, Some(data)) {
            Ok(()) => reply.written(data.len() as u32),
            Err(e) => reply.error(e),
        }
    }

    fn flush(&mut self, _: &Request<'_>, _: u64, _: u64, _: u64, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&mut self, _: &Request<'_>, ino: u64, _: u64, _: bool, reply: ReplyEmpty) {
        self.synced(ino, reply);
    }

    fn fsyncdir(&mut self, _: &Request<'_>, ino: u64, _: u64, _: bool, reply: ReplyEmpty) {
        self.synced(ino, reply);
    }

    fn readdir(
        &mut self,
        _: &Request<'_>,
        ino: u64,
        _: u64,
        offset: i64,
        mut reply: ReplyDirectory,
    ) {
        let mut state = self.0.lock();
        let names = state.names(ino).cloned().unwrap_or_default();
        for (n, (name, ino)) in names.iter().enumerate().skip(offset as usize) {
            let kind = state.attr(*ino).map_or(FileType::RegularFile, |a| a.kind);
            if reply.add(*ino, n as i64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&mut self, _: &Request<'_>, _: u64, reply: ReplyStatfs) {
        reply.statfs(1 << 24, 1 << 23, 1 << 23, 1 << 20, 1 << 19, 4096, 255, 4096);
    }

    fn access(&mut self, _: &Request<'_>, _: u64, _: i32, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fallocate(
        &mut self,
        _: &Request<'_>,
        _: u64,
        _: u64,
        _: i64,
        _: i64,
        _: i32,
        reply: ReplyEmpty,
    ) {
        reply.error(libc::EOPNOTSUPP);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::io::Write;

    #[test]
    fn only_what_was_synced_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let forgetful = Forgetful::mount(dir.path()).unwrap();
        let (kept, lost) = (dir.path().join("kept"), dir.path().join("lost"));
        let mut file = File::create(&kept).unwrap();
        file.write_all(b"synced").unwrap();
        file.sync_all().unwrap();
        File::open(dir.path()).unwrap().sync_all().unwrap();
        file.write_all(b" not synced").unwrap();
        fs::write(&lost, b"its name was not synced").unwrap();
        File::open(&lost).unwrap().sync_all().unwrap();
        drop(file);
        forgetful.forget(None);
        assert_eq!(fs::read(&kept).unwrap(), b"synced");
        assert!(!lost.exists());
        fs::rename(&kept, &lost).unwrap();
        forgetful.forget(None);
        assert!(kept.exists() && !lost.exists());
    }
}
